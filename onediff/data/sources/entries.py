"""Annotations in JSON, JSON lines, CSV and TSV -> entries with the place where each stands, or what is wrong."""

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
_LONGEST = 1 << 26  # characters that one entry may have
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")  # JSON can write it, UTF-8 cannot
_NAMES: dict[type, str] = {str: "text", int: "a number", list: "a list", dict: "an object {...}"}


def read_json(path: Path, kind: type[Kind]) -> Kind:
    """The whole file, which must hold a `kind`. Raises ValueError: file, line, what is wrong."""
    with _opened(path) as file:
        try:
            value = json.load(file)
        except json.JSONDecodeError as error:
            raise _broken(f"{path} line {error.lineno}", error.msg) from None
    return expect(value, kind, str(path))


def read_list(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, entry) of a JSON list of objects, one in memory at a time. Raises ValueError: file, entry, line."""
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
    """(place, entry) of a file of JSON lines; empty lines are none. Raises ValueError: file, line."""
    with _opened(path, newline="\n") as file:
        for number, line in enumerate(file, 1):
            place = f"{path} line {number}"
            try:
                if line.strip():
                    yield place, expect(json.loads(line), dict, place)
            except json.JSONDecodeError as error:
                raise _broken(place, error.msg) from None


def read_tsv(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, dict[str, str]]]:
    """(place, row) of a TSV whose header names these columns; a row is one line. Raises ValueError: file, line."""
    with _opened(path, newline="\n") as file:
        header = [cell.strip().strip('"') for cell in file.readline().rstrip("\r\n").split("\t")]
        absent = [name for name in columns if name not in header]
        if absent:
            raise ValueError(f"{path} line 1: the header lacks {', '.join(absent)}; got {', '.join(header)[:200]}")
        for number, line in enumerate(file, 2):
            place, cells = f"{path} line {number}", line.rstrip("\r\n").split("\t")
            if line.strip() and len(cells) != len(header):
                raise ValueError(f"{place}: {len(header)} columns expected, got {len(cells)}: a tab or a line break "
                                 "inside a text, or broken quoting; take the file as published")
            if line.strip():
                row = zip(header, cells, strict=True)
                yield place, {name: _unquoted(cell, f"{place}, {name}") for name, cell in row}


def read_csv(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """(place, row) of a CSV with a header. Raises ValueError: file, line."""
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
                raise ValueError(f"{path} line 1: the header has '{twice[0]}' twice; call the second one otherwise")
            for cells in filter(None, reader):
                place = f"{path} line {reader.line_num}"
                if len(cells) != len(header):
                    raise ValueError(f"{place}: {len(header)} columns expected, got {len(cells)}: put a text "
                                     'that holds a comma into "quotes"')
                yield place, dict(zip(header, cells, strict=True))
        except csv.Error as error:
            raise ValueError(f"{path} line {reader.line_num}: broken quoting ({error}); a quote inside a quoted text "
                             'is written twice: ""') from None


def expect(value: Any, kind: type[Kind], place: str) -> Kind:
    """The value if it is a `kind`; halves of a character in a text become U+FFFD. Raises ValueError."""
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{place}: {_NAMES[kind]} expected, got {json.dumps(value)[:60]}; take the file as published")
    return _HALF_CHARACTER.sub("\ufffd", value) if isinstance(value, str) else value  # type: ignore[return-value]


def part(entry: dict[str, Any], key: str, kind: type[Kind], place: str) -> Kind:
    """entry[key], which must be a `kind`. Raises ValueError."""
    if key not in entry:
        raise ValueError(f"{place}: '{key}' is missing; it has {', '.join(sorted(entry)) or 'nothing'}: "
                         "take the file as published")
    return expect(entry[key], kind, f"{place}, {key}")


def identity(entry: dict[str, Any], key: str, place: str) -> str:
    """entry[key] as text: an id is published as "1001" or 1001."""
    value = entry.get(key)
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else part(entry, key, str, place)


def one_line(text: str) -> str:
    """The text with single spaces between its words."""
    return " ".join(text.split())


def sentences(values: list[Any], place: str) -> tuple[list[str], int]:
    """The sentences with single spaces, and how many were empty."""
    texts = [one_line(expect(value, str, place)) for value in values]
    return [text for text in texts if text], texts.count("")


@contextmanager
def _opened(path: Path, newline: str | None = None) -> Iterator[TextIO]:
    """The file to read as UTF-8. Raises ValueError if it is not UTF-8."""
    try:
        with path.open(encoding="utf-8-sig", newline=newline) as file:
            yield file
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason} near byte {error.start}); get the file again") from None


def _decode(file: TextIO, buffer: str, place: str) -> tuple[Any, int, str]:
    """(value at the start of the buffer, where it ends, the buffer, which may have grown)."""
    while True:
        try:
            return *_DECODER.raw_decode(buffer), buffer
        except json.JSONDecodeError as error:
            unterminated = error.msg.startswith("Unterminated")
            cut = unterminated or error.pos >= len(buffer) - 16  # read on, and try again
            more = file.read(_CHUNK) if cut and len(buffer) < _LONGEST else ""
            if not more:
                ends = unterminated or error.pos >= len(buffer.rstrip()) - 1
                reason = f"{error.msg}; the file ends here, so it is not whole" if ends else error.msg
                raise _broken(place, reason) from None
            buffer += more


def _skip_blanks(file: TextIO, buffer: str, line: int) -> tuple[str, int]:
    """The buffer from its first character that is no blank, filled up from the file, and its line."""
    while not (rest := buffer.lstrip(" \t\r\n")):
        line += buffer.count("\n")
        buffer = file.read(_CHUNK)
        if not buffer:
            return "", line
    return rest, line + buffer.count("\n", 0, len(buffer) - len(rest))


def _unquoted(cell: str, place: str) -> str:
    if not cell.startswith('"'):
        return cell
    try:
        [value] = next(csv.reader([cell], delimiter="\t", strict=True))
        return value
    except (csv.Error, ValueError):  # quotes that belong to the text, as published
        if cell.count('"') % 2 == 0:
            return cell
    raise ValueError(f"{place}: a quote is opened and never closed, got {cell[:40]!r}; take the file as published")


def _broken(place: str, reason: str) -> ValueError:
    return ValueError(f"{place}: not valid JSON ({reason}); get the file again")
