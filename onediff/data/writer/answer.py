"""What the writer answered: sentences that can be used, or the reason why not; both were paid for and are kept."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from onediff.data.writer.request import Form, Request

MAX_SENTENCES, MAX_WORDS = 5, 100
_FENCE = re.compile(r"\s*```(?:json)?\s*(.*?)\s*```\s*", re.DOTALL)


class _Reply(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @field_validator("*")
    @classmethod
    def _usable(cls, value: Any) -> Any:
        return [_sentence(item) for item in value] if isinstance(value, list) else _sentence(value)


class Differences(_Reply):
    differences: list[str]

    @field_validator("differences")
    @classmethod
    def _some(cls, value: list[str]) -> list[str]:
        if not 1 <= len(value) <= MAX_SENTENCES:
            raise ValueError(f"must hold 1 to {MAX_SENTENCES} sentences, got {len(value)}")
        return value


class Edit(_Reply):
    edit: str
    output: str


class Judgement(_Reply):
    states: Literal["yes", "no", "partly"]
    invents: Literal["yes", "no"]

    @field_validator("*", mode="before")
    @classmethod
    def _in_lower_case(cls, value: Any) -> Any:
        return value.strip().lower() if isinstance(value, str) else value


FORMS: dict[Form, type[_Reply]] = {"differences": Differences, "edit": Edit, "judgement": Judgement}


Status = Literal["ok", "refused", "malformed", "unreadable"]


@dataclass(frozen=True)
class Answer:
    """`text` as it came, `reason` why it cannot be used; `lost` attempts got no reply but may have been billed.

    Tokens are as the endpoint counts them, or as cost.py bounds them where it does not say (`counted` False).
    """

    key: str
    status: Status
    reason: str
    text: str
    model: str
    input_tokens: int
    output_tokens: int
    counted: bool
    lost: int = 0

    def content(self, form: Form) -> dict[str, Any]:
        """What an answer with status ok holds."""
        return parse(self.text, form)


def read_completion(request: Request, completion: Mapping[str, Any]) -> Answer | None:
    """A chat completion -> answer; None if it is none at all. Where usage is missing, tokens are 0 and not counted."""
    try:
        choice = completion["choices"][0]
        message = choice["message"]
        refusal, text = message.get("refusal") or "", message.get("content") or ""
    except (KeyError, IndexError, TypeError, AttributeError):
        return None
    if not isinstance(text, str) or not isinstance(refusal, str):
        return None
    status, reason = _judge(request, text, refusal, choice.get("finish_reason"))
    tokens = _usage(completion)
    return Answer(request.key, status, reason, text or refusal, str(completion.get("model") or request.writer.model),
                  *(tokens or (0, 0)), counted=tokens is not None)


def _usage(completion: Mapping[str, Any]) -> tuple[int, int] | None:
    usage = completion.get("usage")
    if not isinstance(usage, dict):
        return None
    tokens_in, tokens_out = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if not isinstance(tokens_in, int) or not isinstance(tokens_out, int) or min(tokens_in, tokens_out) < 0:
        return None
    return tokens_in, tokens_out


def _judge(request: Request, text: str, refusal: str, finish: Any) -> tuple[Status, str]:
    if refusal:
        return "refused", f"the writer refused: {_short(refusal)}"
    if finish == "content_filter":
        return "refused", "the endpoint's content filter stopped the answer"
    if finish == "length":
        return "malformed", f"cut off at {request.section}.max_tokens {request.writer.max_tokens}"
    try:
        parse(text, request.form)
    except ValueError as error:
        return "malformed", str(error)
    return "ok", ""


def parse(text: str, form: Form) -> dict[str, Any]:
    """The JSON of an answer, bare or in a fence, checked against its schema. Raises ValueError: what it is instead."""
    fenced = _FENCE.fullmatch(text)
    try:
        value = json.loads(fenced[1] if fenced else text)
    except (json.JSONDecodeError, RecursionError):
        raise ValueError(f"not JSON: {_short(text)}") from None
    try:
        return FORMS[form].model_validate(value).model_dump()
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the answer"
        raise ValueError(f"{where}: {first['msg'].removeprefix('Value error, ')}: {_short(text)}") from None


def _sentence(text: str) -> str:
    sentence = " ".join(text.split())
    words = len(sentence.split())
    if not 1 <= words <= MAX_WORDS:
        raise ValueError(f"a sentence must have 1 to {MAX_WORDS} words, got {words}")
    if any(unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") or char == "\ufffd" for char in sentence):
        raise ValueError("a sentence holds control characters or broken text")
    return sentence


def _short(text: str) -> str:
    line = " ".join(text.split())
    return repr(line if len(line) <= 80 else line[:77] + "...")
