"""Writes files and folders under a temporary name and renames them, so that each is either complete or absent.

    with new_folder(Path("data/captions")) as folder: ...     # fill the folder; an error keeps the old one
    with new_file(Path("data/probe.parquet")) as path: ...    # write to `path` with any library
    write_text(Path("data/report.html"), page)

Stages never open an existing output for writing, because that file may be a hard link to a file of DVC's cache.
A killed process leaves `<name>.part` behind. The next writer removes it; git and DVC ignore it.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_REASONS = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "your disk quota is used up",
            errno.EFBIG: "the file is larger than the limit on file sizes (ulimit -f)"}
# Messages of safetensors, SQLite and NumPy, whose exceptions have no errno.
_WORDS = {errno.ENOSPC: re.compile(r"No space left on device|disk is full|os error 28|requested and \d+ written"),
          errno.EDQUOT: re.compile("quota exceeded", re.IGNORECASE), errno.EFBIG: re.compile("File too large")}


class NotWrittenError(OSError):
    """One line: which path could not be written, why, and the cure."""


@contextmanager
def disk_full_named(path: Path) -> Iterator[None]:
    """Raises NotWrittenError in place of any exception by which a library reports a full disk.

    `path`: what is being written; an error that names a file itself is more exact.
    """
    try:
        yield
    except (NotWrittenError, ValueError):  # these explain the failure already
        raise
    except BaseException as error:
        number = _disk_full_errno(error)
        if number:
            if isinstance(error, OSError) and isinstance(error.filename, str):
                path = Path(error.filename)
            existing = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
            free = shutil.disk_usage(existing).free / 1e6
            raise NotWrittenError(
                f"{path} could not be written: {_REASONS[number]} ({free:,.0f} MB are free on the file system of "
                f"{existing}); what was there before is unchanged: make room, then run the same command again"
            ) from error
        raise


def _disk_full_errno(error: BaseException | None) -> int | None:
    """The error number of a full disk if the exception or one of its causes reports one."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _REASONS:
            return error.errno
        for number, words in _WORDS.items():
            if words.search(str(error)):
                return number
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Gives the path to write to; the file takes its name only when it is complete and on disk."""
    part = path.with_name(path.name + ".part")
    try:
        with disk_full_named(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            part.unlink(missing_ok=True)
            yield part
            _sync(part)
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Gives an empty folder to fill; it takes the place of `folder` only when it is complete and on disk."""
    part, old = folder.with_name(folder.name + ".part"), folder.with_name(folder.name + ".old.part")
    _finish_exchange(folder, old)
    shutil.rmtree(part, ignore_errors=True)
    try:
        with disk_full_named(folder):
            part.mkdir(parents=True)
            yield part
            for path in (*part.rglob("*"), part):
                _sync(path)
            if folder.exists():
                folder.rename(old)
            part.rename(folder)
    finally:
        _finish_exchange(folder, old)
        shutil.rmtree(part, ignore_errors=True)


def _finish_exchange(folder: Path, old: Path) -> None:
    """Cleans up if a process was killed between the two renames: restores the old folder if `folder` is missing,
    and removes it otherwise.
    """
    if old.exists() and not folder.exists():
        old.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def link_or_copy(source: Path | str, target: Path | str) -> None:
    """A hard link, which takes no space; a copy where the file system cannot link the two paths."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def write_text(path: Path, text: str) -> None:
    with new_file(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, **options: Any) -> None:
    """`options`: those of json.dumps."""
    write_text(path, json.dumps(value, **options) + "\n")


def write_jsonl(path: Path, rows: Iterable[Any]) -> int:
    """Writes each row as one line of JSON, without holding all of them in memory. Returns the number of lines."""
    num_rows = 0
    with new_file(path) as part, part.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            num_rows += 1
    return num_rows


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def key_of(value: Any) -> str:
    """The SHA-256 of a JSON value; the order of keys in dictionaries makes no difference. Other types become text."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


@contextmanager
def waiting_lock(path: Path) -> Iterator[None]:
    """Holds an exclusive lock on the file, waiting while another process holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def refusing_lock(path: Path, refusal: str) -> Iterator[None]:
    """Holds an exclusive lock on the file, which then names this process.

    Raises ValueError with the text `refusal` if another process holds the lock; "{holder}" in it becomes that process.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(refusal.format(holder=file.read().strip() or "unknown")) from None
        file.truncate(0)
        file.write(f"{os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def _sync(path: Path) -> None:
    """Waits until the file or folder is on disk. Some file systems report a full disk only here."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
