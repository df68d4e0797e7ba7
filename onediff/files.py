"""Write files and folders under a temporary name and rename them, so that each is either complete or absent.

    with new_folder(Path("data/captions")) as folder: ...     # fill the folder; on an error the old folder is kept
    with new_file(Path("data/probe.parquet")) as path: ...    # write to `path` with any library
    write_text(Path("data/report.html"), page)

`check_new_file` refuses a wrong output path before long work.

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
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from onediff.encoding import read_text
from onediff.text_files import json_lines, parse_json

_REASONS = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "your disk quota is used up",
            errno.EFBIG: "the file is larger than the limit on file sizes (ulimit -f)"}
# safetensors, SQLite and NumPy raise exceptions without an errno, so the message shows whether the disk is full.
_WORDS = {errno.ENOSPC: re.compile(r"No space left on device|disk is full|os error 28|requested and \d+ written"),
          errno.EDQUOT: re.compile("quota exceeded", re.IGNORECASE), errno.EFBIG: re.compile("File too large")}
CREATE = "run 'dvc repro' to create it"


class NotWrittenError(OSError):
    """A file or folder could not be written. The message names it, and says why it failed and what to do."""


@contextmanager
def disk_full_named(path: Path) -> Iterator[None]:
    """Context manager that replaces any exception that reports a full disk by a NotWrittenError.

    The NotWrittenError names the file that the replaced exception names, or else `path`, the file or folder that the
    `with` block writes.
    """
    try:
        yield
    except (NotWrittenError, ValueError):  # These exceptions already have a message that explains the failure.
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
    """Return the errno with which the exception or one of its causes reports a full disk or quota; otherwise None."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _REASONS:
            return error.errno
        for number, words in _WORDS.items():
            if words.search(str(error)):
                return number
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


def check_new_file(path: Path) -> None:
    """Raise an OSError that names `path` if no file can be written there, for example because it is a folder.

    Commands call this function before long work, whose result would otherwise be lost. It creates the parent folder.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        kind = "a folder" if os.path.isdir(path) else "a device or a pipe"
        raise IsADirectoryError(f"{path} is {kind}, but must be a file: give the path of a file")
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.unlink(missing_ok=True)  # It may be a hard link to a file of DVC's cache.
        part.touch()
        part.unlink()
    except OSError as error:
        if error.errno in _REASONS:
            raise
        raise NotWrittenError(f"{path} cannot be written ({os.strerror(error.errno or 0)}): give a path in a folder in "
                              "which you may write files") from None


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Context manager that yields a temporary path for writing; at the end, the complete file is renamed to `path`."""
    with disk_full_named(path):
        check_new_file(path)
    part = path.with_name(path.name + ".part")
    try:
        with disk_full_named(path):
            yield part
            _sync(part)
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Context manager that yields an empty temporary folder; at the end, the filled folder replaces `folder`.

    If the `with` block raises an exception, `folder` keeps its old content.
    """
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
    """Finish the replacement of `folder` in `new_folder`, also if a process was killed before it was complete.

    If `folder` does not exist, its previous content is restored from the folder `old`. Then `old` is removed.
    """
    if old.exists() and not folder.exists():
        old.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def link_or_copy(source: Path | str, target: Path | str) -> None:
    """Create `target` as a hard link to the file `source`, or as a copy if the file system does not allow the link."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def find_file(path: Path) -> Path | None:
    """Return the path of an existing file whose name differs from `path` at most in how accents are encoded, or None.

    macOS writes "é" as "e" and an accent (Unicode form NFD), and most other systems write one character (NFC). Raises
    ValueError if two files or folders have names that differ only so, and none of them is the given one.
    """
    if path.is_file():
        return path
    found = Path(path.anchor)
    for part in path.parts[len(found.parts):]:
        same = [found / part] if (found / part).exists() else \
            [item for item in sorted(found.iterdir() if found.is_dir() else ()) if nfc(item.name) == nfc(part)]
        if not same:
            return None
        found, *others = same
        if others:
            raise ValueError(f"{path}: two names differ only in how accents are encoded: {str(found)!a} and "
                             f"{str(others[0])!a}; rename or remove one of them")
    return found if found.is_file() else None


def nfc(name: str) -> str:
    """Return a name with each accented letter as one character (Unicode form NFC), for a comparison of names."""
    return unicodedata.normalize("NFC", name)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file. If writing fails, the old file is unchanged."""
    with new_file(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, **options: Any) -> None:
    """Write `value` to a JSON file. `options` are passed to json.dumps."""
    write_text(path, json.dumps(value, **options) + "\n")


def read_json(path: Path, cure: str = CREATE) -> Any:
    """Return the content of a JSON file that OneDiff wrote. `cure` is the last part of the error messages.

    Raises FileNotFoundError if the file does not exist, and ValueError if it is not valid JSON.
    """
    try:
        return parse_json(read_text(path), str(path), cure)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist: {cure}") from None


def read_jsonl(path: Path, cure: str = CREATE) -> list[Any]:
    """Return the values in a JSON lines file that OneDiff wrote; raises the same errors as `read_json`."""
    try:
        return [value for _, value in json_lines(path, cure)]
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist: {cure}") from None


def write_jsonl(path: Path, rows: Iterable[Any]) -> int:
    """Write a JSON lines file without keeping all rows in memory. Return the number of rows."""
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
    """Return the SHA-256 digest of a JSON value. The order of the keys in dictionaries does not change the digest.

    Values of other types, such as paths, are converted with str().
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


@contextmanager
def waiting_lock(path: Path) -> Iterator[None]:
    """Context manager that holds an exclusive lock on a file. It waits while another process holds this lock."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def refusing_lock(path: Path, refusal: str) -> Iterator[None]:
    """Context manager that holds an exclusive lock on a file, and writes its process id and host name into the file.

    Raises ValueError with the message `refusal` if another process holds the lock. "{holder}" in this message is
    replaced by the process id and the host name of the other process.
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
