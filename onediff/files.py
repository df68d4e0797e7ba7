"""Write files and folders under a temporary name and rename them, so that each is either complete or absent.

    with new_folder(Path("data/captions")) as folder: ...     # fill the folder; on an error the old folder is kept
    with new_file(Path("data/probe.parquet")) as path: ...    # write to `path` with any library
    write_text(Path("data/report.html"), page)

Stages never open an existing output for writing, because this file may be a hard link to a file of DVC's cache.
A killed process may leave a file or folder `<name>.part`. git and DVC ignore it, and the next write removes it.
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
# safetensors, SQLite and NumPy raise exceptions without an errno, so a full disk is recognized by their messages.
_WORDS = {errno.ENOSPC: re.compile(r"No space left on device|disk is full|os error 28|requested and \d+ written"),
          errno.EDQUOT: re.compile("quota exceeded", re.IGNORECASE), errno.EFBIG: re.compile("File too large")}


class NotWrittenError(OSError):
    """A file or folder could not be written. The message says which one, why, and what to do."""


@contextmanager
def disk_full_named(path: Path) -> Iterator[None]:
    """Context manager that raises NotWrittenError instead of any exception with which a library reports a full disk.

    The message mentions the file that the exception contains, or else `path`, the file or folder being written.
    """
    try:
        yield
    except (NotWrittenError, ValueError):  # The messages of these exceptions already explain the failure.
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
                f"{existing}); the previous content is unchanged; free some space, then run the same command again"
            ) from error
        raise


def _disk_full_errno(error: BaseException | None) -> int | None:
    """Return the errno if the exception or one of its causes reports that the disk or the quota is full."""
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
    """Context manager that yields a temporary path to write to, and then renames the synced file to `path`."""
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
    """Yield an empty temporary folder to fill, and replace `folder` with it when it is complete and synced to disk."""
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
    """Clean up after a process that was killed between the two renames of `new_folder`.

    If `folder` does not exist, its previous version `old` is restored. Otherwise `old` is removed.
    """
    if old.exists() and not folder.exists():
        old.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def link_or_copy(source: Path | str, target: Path | str) -> None:
    """Create a hard link, which takes no disk space, or a copy if the file system cannot link the two paths."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file that is either complete or absent."""
    with new_file(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, **options: Any) -> None:
    """Write the value as a JSON file; `options` are passed to json.dumps."""
    write_text(path, json.dumps(value, **options) + "\n")


def write_jsonl(path: Path, rows: Iterable[Any]) -> int:
    """Write each row as one line of JSON without keeping all rows in memory. Return the number of lines."""
    num_rows = 0
    with new_file(path) as part, part.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            num_rows += 1
    return num_rows


def sha256_of(path: Path) -> str:
    """Return the SHA-256 digest of a file's content as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def key_of(value: Any) -> str:
    """Return the SHA-256 digest of a JSON value, independent of the order of keys in dictionaries.

    Values that JSON does not know are converted with str().
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


@contextmanager
def waiting_lock(path: Path) -> Iterator[None]:
    """Context manager that holds an exclusive lock on the file, and waits while another process holds the lock."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def refusing_lock(path: Path, refusal: str) -> Iterator[None]:
    """Context manager that holds an exclusive lock on the file and writes process id and host name into the file.

    Raises ValueError with the text `refusal` if another process holds the lock. A "{holder}" in this text is replaced
    by the process id and the host name of the other process.
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
    """Wait until the file or folder is on disk. Some file systems report a full disk only at this point."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
