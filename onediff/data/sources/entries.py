"""Reads annotation files in JSON, JSON Lines, CSV and TSV, and reports errors with file and line.

Each reader yields (place, entry), where `place` is the position of the entry for messages, such as "a.csv line 3".
"""

import csv
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO, TypeVar

Kind = TypeVar("Kind")
_DECODER = json.JSONDecoder()
_CHUNK = 1 << 16
_LONGEST = 1 << 26  # largest number of characters in one JSON entry or one CSV cell
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")  # lone UTF-16 surrogates, which JSON can contain but UTF-8 cannot
_NAMES: dict[type, str] = {str: "text", int: "a number", list: "a list", dict: "an object {...}"}


def read_json(path: Path, kind: type[Kind]) -> Kind:
    """Return the content of a JSON file.

    Raises ValueError, which names the file, if the content is not valid JSON or is not of type `kind`.
    """
    with _opened(path) as file:
        try:
            value = json.load(file)
        except json.JSONDecodeError as error:
            raise _broken(f"{path} line {error.lineno}", error.msg) from None
    return expect(value, kind, str(path))


def read_list(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, entry) for each object of a JSON file that contains a list of objects.

    `place` is file, entry number and line, for error messages. Only one entry is in memory at a time. Raises
    ValueError, which names this place, if the file is not valid.
    """
    number, due = 0, "["
    with _opened(path) as file:
        buffer, line = _skip_blanks(file, "", 1)
        while not (due == "," and buffer.startswith("]")):
            if not buffer.startswith(due):
                what = "a list [...]" if due == "[" else f"',' or ']' after entry {number}"
                raise _broken(f"{path} line {line}", f"{what} was expected, got {buffer[:20]!r}")
            buffer, line = _skip_blanks(file, buffer[1:], line)
            if due == "[" and buffer.startswith("]"):
                return
            number, due = number + 1, ","
            place = f"{path} entry {number} (line {line})"
            value, end, buffer = _decode(file, buffer, place)
            yield place, expect(value, dict, place)
            buffer, line = _skip_blanks(file, buffer[end:], line + buffer.count("\n", 0, end))


def read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, entry) for each line of a JSON Lines file that is not empty; `place` is file and line.

    Raises ValueError, which names this place, if a line is not a JSON object.
    """
    with _opened(path, newline="\n") as file:
        for number, line in enumerate(file, 1):
            place = f"{path} line {number}"
            try:
                if line.strip():
                    yield place, expect(json.loads(line), dict, place)
            except json.JSONDecodeError as error:
                raise _broken(place, error.msg) from None


def read_tsv(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield (place, row) for each line of a TSV file; `place` is file and line, and `row` maps column names to texts.

    Raises ValueError, which names this place, if the header lacks one of `columns` or a row is not valid.
    """
    with _opened(path, newline="\n") as file:
        header = [cell.strip().strip('"') for cell in file.readline().rstrip("\r\n").split("\t")]
        absent = [name for name in columns if name not in header]
        if absent:
            raise ValueError(f"{path} line 1: the header must contain {', '.join(absent)}, got only the columns "
                             f"{', '.join(header)[:200]}; download the published file again")
        for number, line in enumerate(file, 2):
            place, cells = f"{path} line {number}", line.rstrip("\r\n").split("\t")
            if line.strip() and len(cells) != len(header):
                raise ValueError(f"{place}: {len(header)} columns expected, got {len(cells)}: a text contains a tab or "
                                 "a line break, or its quotes are wrong; download the published file again")
            if line.strip():
                row = zip(header, cells, strict=True)
                yield place, {name: _unquoted(cell, f"{place}, {name}") for name, cell in row}


def read_csv(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield (place, row) for each row of a CSV file; `place` is file and line, and `row` maps column names to texts.

    Raises ValueError, which names this place, if the header or a row is not valid.
    """
    with _opened(path, newline="") as file:
        reader = csv.reader(file, strict=True)
        csv.field_size_limit(_LONGEST)
        try:
            header = [name.strip() for name in next(reader, [])]
            if len(header) == 1 and (separator := next((sign for sign in ";\t" if sign in header[0]), "")):
                raise ValueError(f"{path} line 1: the columns must be separated by commas, got "
                                 f"{'a semicolon' if separator == ';' else 'a tab'} in {header[0]!r}: save the table "
                                 "as CSV with commas")
            twice = [name for name in header if header.count(name) > 1]
            if twice:
                raise ValueError(f"{path} line 1: the header contains column '{twice[0]}' twice; rename one of them")
            for cells in filter(None, reader):
                place = f"{path} line {reader.line_num}"
                if len(cells) != len(header):
                    raise ValueError(f"{place}: {len(header)} columns expected, got {len(cells)}: put a text "
                                     'that contains a comma into "quotes"')
                yield place, dict(zip(header, cells, strict=True))
        except csv.Error as error:
            raise ValueError(f"{path} line {reader.line_num}: wrong quotes ({error}); write a quote inside a quoted "
                             'text twice: ""') from None


def expect(value: Any, kind: type[Kind], place: str) -> Kind:
    """Return the value if it is of type `kind`, otherwise raise ValueError, which names `place`.

    If the value is a string, each lone surrogate (half of a UTF-16 character) in it is replaced by U+FFFD.
    """
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{place}: {_NAMES[kind]} expected, got {json.dumps(value)[:60]}; correct the file, or "
                         "download it again")
    return _HALF_CHARACTER.sub("\ufffd", value) if isinstance(value, str) else value  # type: ignore[return-value]


def part(entry: dict[str, Any], key: str, kind: type[Kind], place: str) -> Kind:
    """Return entry[key]. Raises ValueError if the entry lacks this key or the value is not of type `kind`."""
    if key not in entry:
        raise ValueError(f"{place}: '{key}' is missing, got only {', '.join(sorted(entry)) or 'an empty entry'}; "
                         "correct the file, or download it again")
    return expect(entry[key], kind, f"{place}, {key}")


def identity(entry: dict[str, Any], key: str, place: str) -> str:
    """Return the identifier entry[key] as a string, because some files store it as "1001" and other files as 1001."""
    value = entry.get(key)
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else part(entry, key, str, place)


def one_line(text: str) -> str:
    """Return the text on one line, with single spaces between the words."""
    return " ".join(text.split())


def sentences(values: list[Any], place: str) -> tuple[list[str], int]:
    """Return the sentences in `values` that are not empty, and the number of empty sentences.

    Each returned sentence is on one line. Raises ValueError, which names `place`, if a value is not a string.
    """
    texts = [one_line(expect(value, str, place)) for value in values]
    return [text for text in texts if text], texts.count("")


@contextmanager
def _opened(path: Path, newline: str | None = None) -> Iterator[TextIO]:
    """Open a text file for reading. Raises ValueError if its content is not UTF-8, IsADirectoryError for a folder."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, but must be a file: replace the folder by a file")
    try:
        with path.open(encoding="utf-8-sig", newline=newline) as file:
            yield file
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: must be UTF-8, got {error.reason} near byte {error.start}; "
                         "download the file again") from None


def _decode(file: TextIO, buffer: str, place: str) -> tuple[Any, int, str]:
    """Decode the JSON value at the start of `buffer`; if the buffer ends within the value, read more of the file.

    Return the value, the position in the buffer where it ends, and the buffer including the text that was read.
    """
    while True:
        try:
            return *_DECODER.raw_decode(buffer), buffer
        except json.JSONDecodeError as error:
            unterminated = error.msg.startswith("Unterminated")
            # An error near the end of the buffer may mean that the value continues in the unread part of the file.
            may_continue = unterminated or error.pos >= len(buffer) - 16
            more = file.read(_CHUNK) if may_continue and len(buffer) < _LONGEST else ""
            if not more:
                ends = unterminated or error.pos >= len(buffer.rstrip()) - 1
                reason = f"{error.msg}; the file ends too early, so it is incomplete" if ends else error.msg
                raise _broken(place, reason) from None
            buffer += more


def _skip_blanks(file: TextIO, buffer: str, line: int) -> tuple[str, int]:
    """Skip the white space at the start of `buffer`; return the rest, and the line number at which the rest starts.

    If the buffer contains only white space, more text is read from the file. At the end of the file, the rest is "".
    """
    while not (rest := buffer.lstrip(" \t\r\n")):
        line += buffer.count("\n")
        buffer = file.read(_CHUNK)
        if not buffer:
            return "", line
    return rest, line + buffer.count("\n", 0, len(buffer) - len(rest))


def _unquoted(cell: str, place: str) -> str:
    """Return the text of a TSV cell without the quotes around it. Raises ValueError if the closing quote is missing."""
    if not cell.startswith('"'):
        return cell
    try:
        [value] = next(csv.reader([cell], delimiter="\t", strict=True))
        return value
    except (csv.Error, ValueError):
        if cell.count('"') % 2 == 0:
            return cell  # Some published texts begin with a quoted word; these quotes are part of the text.
    raise ValueError(f"{place}: a quote is opened but never closed, got {cell[:40]!r}; download the published file "
                     "again")


def _broken(place: str, reason: str) -> ValueError:
    return ValueError(f"{place}: not valid JSON ({reason}); download the file again")
