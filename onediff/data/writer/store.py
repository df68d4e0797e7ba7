"""Answers on disk: one line each, appended in a single write and never changed, because each of them was paid for."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from onediff.data.writer.answer import Answer

FOLDER = Path("data/answers")
MIN_FREE_BYTES = 16 * 2**20  # nothing is asked on a disk with less room: what is in flight must still be kept
_NAMES = [field.name for field in fields(Answer)]


def answers_path(source: str, stage: str) -> Path:
    return FOLDER / source / f"{stage}.jsonl"


def read_answers(path: Path) -> dict[str, Answer]:
    """Key -> answer; none where there is no file. A torn last line counts as no answer. Raises ValueError."""
    content = path.read_bytes() if path.exists() else b""
    found: dict[str, Answer] = {}
    for number, row in _rows(content[:_whole(content)], path):
        if "torn" not in row:
            answer = _answer(row, path, number)
            found.setdefault(answer.key, answer)
    return found


def spent_usd(folder: Path = FOLDER) -> float:
    """What all kept answers cost, of every source and stage."""
    total = 0.0
    for path in sorted(folder.glob("*/*.jsonl")):
        content = path.read_bytes()
        total += sum(float(row.get("usd", 0)) for _, row in _rows(content[:_whole(content)], path))
    return total


class Store:
    """The answers of one source and stage, open for appending by one run at a time."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError if another run holds the file or a line inside it is broken."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.torn = self._mend()
            self.answers = read_answers(path)
        except BlockingIOError:
            os.close(self._file)
            raise ValueError(f"{path}: another run is asking the writer for it; wait for its end") from None
        except ValueError:
            os.close(self._file)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        os.close(self._file)  # frees the lock, as a kill does

    def append(self, answer: Answer, *, usd: float) -> None:
        """On disk when this returns. Raises OSError, with the file as it was, if there is no room."""
        self._write(asdict(answer) | {"usd": usd})
        self.answers[answer.key] = answer

    def has_room(self) -> bool:
        there = os.statvfs(self.path.parent)
        return there.f_bavail * there.f_frsize >= MIN_FREE_BYTES

    def _write(self, row: dict[str, Any]) -> None:
        line = json.dumps(row, ensure_ascii=True).encode() + b"\n"
        size = os.fstat(self._file).st_size
        try:
            written = os.write(self._file, line)
            os.fsync(self._file)
        except OSError as error:
            raise OSError(f"{self.path}: an answer could not be kept ({error.strerror}); make room and run again"
                          ) from None
        if written < len(line):
            os.ftruncate(self._file, size)
            raise OSError(f"{self.path}: an answer could not be kept (the disk is full); make room and run again")

    def _mend(self) -> str:
        """What a kill left of the last line is set aside as a line of its own; returns it, "" if there was none."""
        content = self.path.read_bytes()
        whole = _whole(content)
        rest = content[whole:]
        if not rest:
            return ""
        os.ftruncate(self._file, whole)
        torn = rest.decode("utf-8", "replace")
        self._write({"torn": torn})
        return torn


def _whole(content: bytes) -> int:
    """Bytes up to the end of the last whole line."""
    return content.rfind(b"\n") + 1


def _rows(content: bytes, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(content.splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise ValueError(f"{path} line {number}: not a JSON object; fetch the file again ('dvc checkout {path}'), "
                             "or delete the line: its answer is then asked and paid for again")
        yield number, row


def _answer(row: dict[str, Any], path: Path, number: int) -> Answer:
    missing = [name for name in _NAMES if name not in row]
    if missing:
        raise ValueError(f"{path} line {number}: lacks {', '.join(missing)}; fetch the file again "
                         f"('dvc checkout {path}'), or delete the line: its answer is then asked and paid for again")
    return Answer(**{name: row[name] for name in _NAMES})
