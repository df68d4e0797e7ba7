"""Answers of the writer: how they are checked, and the files that store them.

Unusable answers are stored too, with the reason, because they were paid for as well. An answer file contains one JSON
object per line. Each line is appended in a single write and never changed.
"""

import errno
import fcntl
import json
import os
import re
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from io import FileIO
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationError

from onediff.data.writer.request import Form, Request, Tokens, max_tokens
from onediff.paths import ANSWERS

MAX_SENTENCES, MAX_WORDS = 5, 100
# With less free disk space, no request is sent, because the answers to earlier requests must still be stored.
MIN_FREE_BYTES = 16 * 2**20
_FENCE = re.compile(r"\s*```(?:json)?\s*(.*?)\s*```\s*", re.DOTALL)
_CURE = ("restore the file with 'dvc checkout {}', or delete this line: the next run then sends the request, and pays "
         "for it, again")

Status = Literal["ok", "refused", "malformed", "unreadable"]


@dataclass(frozen=True)
class Answer:
    """One stored answer of the writer, a language model, to the request with the digest `key`.

    `text` is the unchanged answer, and `reason` says why it cannot be used ("" if it can). `lost` counts the attempts
    that got no reply but may have been billed. If `counted` is true, the endpoint reported the token counts; otherwise
    the counts are upper bounds.
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


def _sentence(text: str) -> str:
    sentence = " ".join(text.split())
    words = len(sentence.split())
    if not 1 <= words <= MAX_WORDS:
        raise ValueError(f"a sentence must have 1 to {MAX_WORDS} words, got {words}")
    if any(unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") or char == "\ufffd" for char in sentence):
        raise ValueError("a sentence must not contain control characters or undecodable text")
    return sentence


def _sentences(texts: list[str]) -> list[str]:
    sentences = [_sentence(text) for text in texts]
    if not 1 <= len(sentences) <= MAX_SENTENCES:
        raise ValueError(f"must contain 1 to {MAX_SENTENCES} sentences, got {len(sentences)}")
    return sentences


def _lower_case(value: Any) -> Any:
    return value.strip().lower() if isinstance(value, str) else value


class _Reply(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Differences(_Reply):
    differences: Annotated[list[str], AfterValidator(_sentences)]


class Edit(_Reply):
    edit: Annotated[str, AfterValidator(_sentence)]
    output: Annotated[str, AfterValidator(_sentence)]


class Judgement(_Reply):
    states: Annotated[Literal["yes", "no", "partly"], BeforeValidator(_lower_case)]
    invents: Annotated[Literal["yes", "no"], BeforeValidator(_lower_case)]


_FORMS: dict[Form, type[_Reply]] = {"differences": Differences, "edit": Edit, "judgement": Judgement}


def parse(text: str, form: Form) -> dict[str, Any]:
    """Parse the JSON of an answer, which may be in a Markdown code block, and check it against the schema of `form`.

    Raises ValueError, which quotes the answer, if it is not JSON or does not match the schema.
    """
    fenced = _FENCE.fullmatch(text)
    try:
        return _FORMS[form].model_validate(json.loads(fenced[1] if fenced else text)).model_dump()
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the answer"
        raise ValueError(f"{where}: {first['msg'].removeprefix('Value error, ')}: {excerpt(text)}") from None
    except (json.JSONDecodeError, RecursionError):
        raise ValueError(f"not JSON: {excerpt(text)}") from None


def read_completion(request: Request, completion: Any) -> Answer | None:
    """Convert the decoded JSON of an HTTP reply to an answer; return None if it is not a chat completion."""
    try:
        choice = completion["choices"][0]
        refusal, text = choice["message"].get("refusal") or "", choice["message"].get("content") or ""
    except (KeyError, IndexError, TypeError, AttributeError):
        return None
    if not isinstance(text, str) or not isinstance(refusal, str):
        return None
    status, reason = _status_of(request, text, refusal, choice.get("finish_reason"))
    usage = completion.get("usage")
    counts = [usage.get("prompt_tokens"), usage.get("completion_tokens")] if isinstance(usage, dict) else [None]
    counted = all(isinstance(count, int) and count >= 0 for count in counts)
    tokens = Tokens(*counts) if counted else max_tokens(request)
    return Answer(request.key, status, reason, text or refusal, str(completion.get("model") or request.writer.model),
                  tokens.input, tokens.output, counted)


def _status_of(request: Request, text: str, refusal: str, finish_reason: Any) -> tuple[Status, str]:
    if refusal:
        return "refused", f"the writer refused: {excerpt(refusal)}"
    if finish_reason == "content_filter":
        return "refused", "the endpoint's content filter stopped the answer"
    if finish_reason == "length":
        return "malformed", f"the answer was cut off at {request.section}.max_tokens {request.writer.max_tokens}"
    try:
        parse(text, request.form)
    except ValueError as error:
        return "malformed", str(error)
    return "ok", ""


def excerpt(text: str, length: int = 80) -> str:
    """Return the text in quotes, on one line and shortened to at most `length` characters."""
    line = " ".join(text.split())
    return repr(line if len(line) <= length else line[:length - 3] + "...")


def answers_path(source: str, stage: str) -> Path:
    """Return the path of the file that stores the writer's answers for one source and stage."""
    return ANSWERS / source / f"{stage}.jsonl"


def read_answers(path: Path) -> dict[str, Answer]:
    """Read an answer file as {key of the request: answer}; return {} if the file does not exist.

    A line that is incomplete because a run was killed during the write is skipped. Any other invalid line raises
    ValueError.
    """
    answers: dict[str, Answer] = {}
    names = [field.name for field in fields(Answer)]
    for number, row in _rows(path):
        missing = [name for name in names if name not in row]
        if "torn" not in row and missing:
            raise ValueError(f"{path} line {number}: missing keys: {', '.join(missing)}; {_CURE.format(path)}")
        if not missing:
            answers.setdefault(row["key"], Answer(**{name: row[name] for name in names}))
    return answers


def spent_usd(folder: Path = ANSWERS) -> float:
    """Return the total cost in US dollars of all stored answers, over every source and stage."""
    return sum((sum(float(row.get("usd", 0)) for _, row in _rows(path)) for path in sorted(folder.glob("*/*.jsonl"))),
               start=0.0)


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, JSON object) for every line of an answer file, except a last line without a line break."""
    content = path.read_bytes() if path.exists() else b""
    for number, line in enumerate(content[:content.rfind(b"\n") + 1].splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise ValueError(f"{path} line {number}: not a JSON object; {_CURE.format(path)}")
        yield number, row


@contextmanager
def open_answers(path: Path) -> Iterator[FileIO]:
    """Open an answer file for `append`, and lock it until the file is closed or the process ends.

    If a killed run left an incomplete last line, the line is rewritten as JSON with the key `torn`, which readers do
    not count as an answer. Raises ValueError if another run has locked the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileIO(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{path}: another run is writing answers to this file; wait until that run has ended"
                             ) from None
        content = path.read_bytes()
        end = content.rfind(b"\n") + 1
        if content[end:]:
            file.truncate(end)
            _write(file, {"torn": content[end:].decode("utf-8", "replace")})
        yield file


def append(answer: Answer, file: FileIO, *, usd: float) -> None:
    """Append an answer and its cost to the answer file; both are on disk when this function returns.

    Raises OSError, and leaves the file unchanged, if the disk is full.
    """
    _write(file, asdict(answer) | {"usd": usd})


def has_room(file: FileIO) -> bool:
    """Return whether the disk of the answer file has at least MIN_FREE_BYTES of free space."""
    disk = os.fstatvfs(file.fileno())
    return disk.f_bavail * disk.f_frsize >= MIN_FREE_BYTES


def _write(file: FileIO, row: dict[str, Any]) -> None:
    line = json.dumps(row, ensure_ascii=True).encode() + b"\n"
    size = os.fstat(file.fileno()).st_size
    try:
        if file.write(line) < len(line):
            file.truncate(size)
            raise OSError(errno.ENOSPC, "the disk is full")
        os.fsync(file)
    except OSError as error:
        raise OSError(f"{file.name}: an answer could not be stored ({error.strerror}); free disk space and run the "
                      "command again") from None
