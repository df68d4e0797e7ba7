"""Opens text files and checks their encoding.

A file must be UTF-8. UTF-8 and UTF-16 with a byte order mark, as Windows programs and spreadsheets write them, are read
too. The encoding of any other file is not guessed: the file is refused, with the line and the command that converts it.
"""

import codecs
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import TextIO

_START = 1 << 10  # number of bytes at the start of a file that show whether it is text


@contextmanager
def open_text(path: Path, form: str = "a file", *, newline: str | None = None) -> Iterator[TextIO]:
    """Open a text file for reading. `form` says what the file must be, such as "a YAML file".

    Raises ValueError for a wrong encoding, also while the file is read, IsADirectoryError for a folder, and
    FileNotFoundError if the file does not exist.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, but must be {form}: give the path of a file, or replace the "
                                "folder by a file")
    with path.open("rb") as content:  # The path may be a pipe, so it is opened only once.
        encoding = _encoding(path, content.peek(_START)[:_START])
        try:
            with TextIOWrapper(content, encoding=encoding, newline=newline) as file:
                yield file
        except UnicodeDecodeError as error:
            raise _wrong_encoding(path, encoding, error) from None


def read_text(path: Path, form: str = "a file") -> str:
    """Return the content of a text file; `open_text` explains `form` and the errors."""
    with open_text(path, form) as file:
        return file.read()


def _encoding(path: Path, start: bytes) -> str:
    """Return the encoding of a file that begins with the bytes `start`.

    Raises ValueError for UTF-32, and for UTF-16 without a byte order mark.
    """
    if start.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        raise ValueError(f"{path} line 1: must be UTF-8, got UTF-32; {_convert(path, 'UTF-32')}")
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if b"\0" in start:
        line, likely = start[:start.index(b"\0")].count(b"\n") + 1, "UTF-16BE" if start[:1] == b"\0" else "UTF-16LE"
        raise ValueError(f"{path} line {line}: must be UTF-8, got a zero byte; if the file is {likely}, "
                         f"{_convert(path, likely)}")
    return "utf-8-sig"


def _wrong_encoding(path: Path, encoding: str, error: UnicodeDecodeError) -> ValueError:
    """Return the error for a file whose content does not have this encoding. `error` is about a part of the file."""
    place, got = str(path), f"byte {error.object[error.start]:#04x} ({error.reason})"
    if path.is_file():  # A pipe cannot be read again to count its lines.
        place += f" line {_line_of_error(path.read_bytes(), encoding)}"
    if encoding == "utf-16":
        return ValueError(f"{place}: must be UTF-16, as the start of the file says, got {got}; save the file as UTF-8")
    return ValueError(f"{place}: must be UTF-8, got {got}; if a Windows program wrote the file, "
                      f"{_convert(path, 'WINDOWS-1252')}; otherwise name the encoding of that program after -f")


def _line_of_error(content: bytes, encoding: str) -> int:
    """Return the number of the line that contains the first character which does not have this encoding."""
    encoding = encoding.removesuffix("-sig")  # With this suffix, positions in errors do not count the byte order mark.
    try:
        content.decode(encoding)
    except UnicodeDecodeError as error:
        before = content[:error.start].decode(encoding, errors="ignore")
        return before.replace("\r\n", "\n").replace("\r", "\n").count("\n") + 1
    raise AssertionError("the file changed while it was read")


def _convert(path: Path, encoding: str) -> str:
    source, target = shlex.quote(str(path)), shlex.quote(f"{path}.utf8")
    return f"convert it with: iconv -f {encoding} -t UTF-8 {source} > {target} && mv {target} {source}"
