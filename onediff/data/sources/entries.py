"""Annotations in JSON, JSON lines, CSV and TSV -> entries with the place where each stands, or what is wrong."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn, TextIO, TypeVar

Kind = TypeVar("Kind")
_CHUNK = 1 << 16
_LONGEST = 1 << 26  # characters that one entry may have
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")  # JSON can write it, UTF-8 cannot
_NAMES: dict[type, str] = {str: "text", int: "a number", list: "a list", dict: "an object {...}"}


def read_json(path: Path, kind: type[Kind]) -> Kind:
    """The whole file, which must hold a `kind`. Raises ValueError: file, line, what is wrong."""
    try:
        value = json.loads(_text(path))
    except json.JSONDecodeError as error:
        _broken(f"{path} line {error.lineno}", error.msg)
    return expect(value, kind, str(path))


def read_list(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, entry) of a JSON list of objects, one in memory at a time. Raises ValueError: file, entry, line."""
    decoder, line, number, due = json.JSONDecoder(), 1, 0, "["
    with path.open(encoding="utf-8-sig") as file:
        buffer, line = _skip_blanks(path, file, "", line)
        while True:
            if due == "," and buffer.startswith("]"):
                return
            if not buffer.startswith(due):
                what = "a list [...]" if due == "[" else f"',' or ']' after entry {number}"
                _broken(f"{path} line {line}", f"{what} was expected, got {buffer[:20]!r}")
            buffer, line = _skip_blanks(path, file, buffer[1:], line)
            if due == "[" and buffer.startswith("]"):
                return
            number += 1
            place = f"{path} entry {number} (line {line})"
            value, end, buffer = _decode(path, file, decoder, buffer, place)
            yield place, expect(value, dict, place)
            line += buffer.count("\n", 0, end)
            buffer, line = _skip_blanks(path, file, buffer[end:], line)
            due = ","


def read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, entry) of a file of JSON lines; empty lines are none. Raises ValueError: file, line."""
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            place = f"{path} line {number}"
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                _broken(place, error.msg)
            yield place, expect(value, dict, place)


def read_tsv(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, dict[str, str]]]:
    """(place, row) of a TSV whose header names these columns; a row is one line. Raises ValueError: file, line."""
    for number, line in enumerate(_lines(path), 1):
        place, cells = f"{path} line {number}", line.rstrip("\r\n").split("\t")
        if number == 1:
            header = [cell.strip().strip('"') for cell in cells]
            absent = [name for name in columns if name not in header]
            if absent:
                raise ValueError(f"{place}: the header lacks {', '.join(absent)}; got {', '.join(header)[:200]}")
            continue
        if not line.strip():
            continue
        if len(cells) != len(header):
            raise ValueError(f"{place}: {len(header)} columns expected, got {len(cells)}: a tab or a line break inside "
                             "a text, or broken quoting; take the file as published")
        yield place, {name: _unquoted(cell, f"{place}, {name}") for name, cell in zip(header, cells, strict=True)}


def read_csv(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """(place, row) of a CSV with a header. Raises ValueError: file, line."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        csv.field_size_limit(_LONGEST)
        try:
            header = [name.strip() for name in next(reader, [])]
            twice = [name for name in header if header.count(name) > 1]
            if twice:
                raise ValueError(f"{path}: the header has '{twice[0]}' twice; call the second one otherwise")
            for cells in reader:
                place = f"{path} line {reader.line_num}"
                if cells and len(cells) != len(header):
                    raise ValueError(f"{place}: {len(header)} columns expected, got {len(cells)}: put a text "
                                     'that holds a comma into "quotes"')
                if cells:
                    yield place, dict(zip(header, cells, strict=True))
        except csv.Error as error:
            raise ValueError(f"{path} line {reader.line_num}: broken quoting ({error}); a quote inside a quoted text "
                             'is written twice: ""') from None
        except UnicodeDecodeError as error:
            _not_utf8(path, error)


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


def sentences(values: list[Any], place: str) -> tuple[list[str], int]:
    """The sentences with single spaces, and how many were empty."""
    texts = [" ".join(expect(value, str, place).split()) for value in values]
    return [text for text in texts if text], texts.count("")


def _decode(path: Path, file: TextIO, decoder: json.JSONDecoder, buffer: str, place: str) -> tuple[Any, int, str]:
    """(value at the start of the buffer, where it ends, the buffer, which may have grown)."""
    while True:
        try:
            value, end = decoder.raw_decode(buffer)
            return value, end, buffer
        except json.JSONDecodeError as error:
            cut = error.pos >= len(buffer) - 16 or error.msg.startswith("Unterminated")  # read on, and try again
            more = _more(path, file) if cut and len(buffer) < _LONGEST else ""
            if not more:
                ends = error.msg.startswith("Unterminated") or error.pos >= len(buffer.rstrip()) - 1
                _broken(place, f"{error.msg}; the file ends here, so it is not whole" if ends else error.msg)
            buffer += more


def _skip_blanks(path: Path, file: TextIO, buffer: str, line: int) -> tuple[str, int]:
    """The buffer from its first character that is no blank, filled up from the file, and its line."""
    while not (rest := buffer.lstrip(" \t\r\n")):
        line += buffer.count("\n")
        buffer = _more(path, file)
        if not buffer:
            return "", line
    return rest, line + buffer.count("\n", 0, len(buffer) - len(rest))


def _more(path: Path, file: TextIO) -> str:
    try:
        return file.read(_CHUNK)
    except UnicodeDecodeError as error:
        _not_utf8(path, error)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        _not_utf8(path, error)


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        try:
            yield from file
        except UnicodeDecodeError as error:
            _not_utf8(path, error)


def _unquoted(cell: str, place: str) -> str:
    if not cell.startswith('"'):
        return cell
    try:
        values = next(csv.reader([cell], delimiter="\t", strict=True))
    except csv.Error:
        values = []
    if len(values) == 1:
        return values[0]
    if cell.count('"') % 2:
        raise ValueError(f"{place}: a quote is opened and never closed, got {cell[:40]!r}; take the file as published")
    return cell


def _broken(place: str, reason: str) -> NoReturn:
    raise ValueError(f"{place}: not valid JSON ({reason}); get the file again")


def _not_utf8(path: Path, error: UnicodeDecodeError) -> NoReturn:
    raise ValueError(f"{path}: not UTF-8 ({error.reason} near byte {error.start}); get the file again") from None
