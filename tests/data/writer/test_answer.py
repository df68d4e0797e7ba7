"""Answers: what can be used is used, and the rest says why not."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from onediff.data.writer.answer import parse, read_completion
from onediff.data.writer.request import Request

GOOD = '{"differences": ["a dog\\n came", "the sky is grey"]}'


def completion(content: str | None, **changes: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": content, "refusal": changes.pop("refusal", None)}
    return {"model": "dated", "choices": [{"message": message, "finish_reason": changes.pop("finish", "stop")}],
            "usage": {"prompt_tokens": 101, "completion_tokens": 11}} | changes


@pytest.mark.parametrize("text", [GOOD, f"```json\n{GOOD}\n```", f" ```\n{GOOD}```\n"])
def test_json_is_read_bare_or_fenced(ask_about: Callable[[int], Request], text: str) -> None:
    answer = read_completion(ask_about(1), completion(text))
    assert answer is not None
    assert (answer.status, answer.reason, answer.text, answer.model) == ("ok", "", text, "dated")
    assert (answer.input_tokens, answer.output_tokens, answer.counted) == (101, 11, True)
    assert answer.content("differences") == {"differences": ["a dog came", "the sky is grey"]}


@pytest.mark.parametrize(("content", "changes", "status", "reason"), [
    ("I am sorry, I cannot", {}, "malformed", "not JSON: 'I am sorry"),
    ("[" * 100_000, {}, "malformed", "not JSON"),
    ('{"differences": "a"}', {}, "malformed", "differences: Input should be a valid list"),
    ('{"differences": []}', {}, "malformed", "must hold 1 to 5 sentences, got 0"),
    ('{"differences": ["a", "b", "c", "d", "e", "f"]}', {}, "malformed", "got 6"),
    ('{"differences": [" "]}', {}, "malformed", "must have 1 to 100 words, got 0"),
    (json.dumps({"differences": ["word " * 10_000]}), {}, "malformed", "must have 1 to 100 words, got 10000"),
    ('{"differences": ["a\\u0007b"]}', {}, "malformed", "control characters"),
    ('{"differences": ["a"], "note": "b"}', {}, "malformed", "note: Extra inputs"),
    ("[1]", {}, "malformed", "the answer: Input should be"),
    ("", {}, "malformed", "not JSON: ''"),
    (GOOD, {"finish": "length"}, "malformed", "cut off at data.writer.max_tokens 61"),
    (GOOD, {"finish": "content_filter"}, "refused", "content filter"),
    (None, {"refusal": "I will not"}, "refused", "the writer refused: 'I will not'"),
])
def test_what_cannot_be_used_says_why(ask_about: Callable[[int], Request], content: str, changes: dict[str, Any],
                                      status: str, reason: str) -> None:
    answer = read_completion(ask_about(1), completion(content, **changes))
    assert answer is not None
    assert answer.status == status
    assert reason in answer.reason
    assert answer.output_tokens == 11


@pytest.mark.parametrize("value", [{}, {"choices": []}, {"choices": [{"message": None}]}, {"choices": 3},
                                   {"choices": [{"message": {"content": 3}}]}, {"error": {"message": "busy"}}])
def test_what_is_no_completion_is_none(ask_about: Callable[[int], Request], value: dict[str, Any]) -> None:
    assert read_completion(ask_about(1), value) is None


@pytest.mark.parametrize("usage", [None, {}, {"prompt_tokens": "7", "completion_tokens": 1}, 3])
def test_missing_usage_is_not_counted(ask_about: Callable[[int], Request], usage: Any) -> None:
    answer = read_completion(ask_about(1), completion(GOOD, usage=usage))
    assert answer is not None
    assert (answer.counted, answer.input_tokens) == (False, 0)


def test_an_edit_has_two_sentences() -> None:
    assert parse('{"edit": "make it snow", "output": "snow"}', "edit") == {"edit": "make it snow", "output": "snow"}
    with pytest.raises(ValueError, match="output: Field required"):
        parse('{"edit": "make it snow"}', "edit")
