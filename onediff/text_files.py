"""Reads the text files that people and other tools write: JSON, JSON Lines and tables.

Each reader yields (place, entry), where `place` is the position of the entry for messages, such as "a.csv line 3".
"""

import csv
import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, TextIO, TypeVar

from onediff.encoding import open_text, read_text

Kind = TypeVar("Kind")
CURE = "correct the file; download it again if you did not write it"
SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab"}
_CHUNK = 1 << 16
_LONGEST = 1 << 26  # largest number of characters in one JSON entry or one cell of a table
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")  # lone UTF-16 surrogates, which JSON can contain but UTF-8 cannot
_NAMES: dict[type, str] = {str: "text", int: "a number", list: "a list", dict: "an object {...}"}
_QUOTED = re.compile('"[^"]*"?')


def parse_json(text: str, place: str, cure: str = CURE) -> Any:
    """Return the value of a JSON text. Raises ValueError, which names `place`, if the text is not valid JSON.

    An object in which a key occurs twice is not valid, because only one of the two values would be used.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        line = f" line {error.lineno}" if "\n" in text.strip() else ""
        raise _broken(f"{place}{line}", f"{error.msg} at column {error.colno}", cure) from None
    except (ValueError, RecursionError) as error:  # a key that occurs twice, a very long number, or deep nesting
        raise _broken(place, str(error), cure) from None


def read_json(path: Path, kind: type[Kind]) -> Kind:
    """Return the content of a JSON file.

    Raises ValueError, which names the file, if the content is not valid JSON or is not of type `kind`.
    """
    return expect(parse_json(read_text(path), str(path)), kind, str(path))


def json_lines(path: Path, cure: str = CURE) -> Iterator[tuple[str, Any]]:
    """Yield (place, value) for each line of a JSON Lines file that is not empty; `place` is file and line.

    Raises ValueError, which names this place and ends with `cure`, if a line is not valid JSON.
    """
    with open_text(path) as file:  # Unlike splitlines(), a file has no line end at U+2028 inside of a text.
        yield from parse_lines(file, path, cure)


def parse_lines(lines: Iterable[str], path: Path, cure: str = CURE) -> Iterator[tuple[str, Any]]:
    """Yield what `json_lines` yields, for the lines of the file `path` that is already open."""
    for number, line in enumerate(lines, 1):
        if line.strip():
            place = f"{path} line {number}"
            yield place, parse_json(line, place, cure)


def read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, entry) for each line of a JSON Lines file that is not empty; `place` is file and line.

    Raises ValueError, which names this place, if a line is not a JSON object.
    """
    return ((place, expect(value, dict, place)) for place, value in json_lines(path))


def read_list(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, entry) for each object of a JSON file that contains a list of objects.

    `place` is file, entry number and line, for error messages. Only one entry is in memory at a time. Raises
    ValueError, which names this place, if the file is not valid.
    """
    number, due = 0, "["
    with open_text(path) as file:
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


def read_table(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield (place, row) for each row of a table; `place` is file and line, and `row` maps column names to texts.

    The table is CSV, with a header. Columns are separated by commas, semicolons or tabs: by the one that the header
    contains. Column names become lower case. Rows without any text, and columns without a name and text, are left out.
    Raises ValueError, which names the place, if the header or a row is not valid.
    """
    with open_text(path, newline="") as file:
        csv.field_size_limit(_LONGEST)
        start, first = next(((number, line) for number, line in enumerate(file, 1) if line.strip()), (1, ""))
        separator = _separator(first, f"{path} line {start}")
        reader = csv.reader(chain([first], file), strict=True, delimiter=separator)
        header: list[str] | None = None
        while True:
            place = f"{path} line {start + reader.line_num}"
            try:
                cells = next(reader, None)
            except csv.Error as error:
                raise ValueError(f"{place}: wrong quotes ({error}); write a quote inside a quoted text twice: \"\""
                                 ) from None
            if cells is None:
                return
            if header is None:
                header = _header(cells, place)
            elif any(map(str.strip, cells)):
                yield place, _row(header, cells, place, SEPARATORS[separator])


def _separator(header: str, place: str) -> str:
    """Return the separator of the columns in the header of a table. Raises ValueError if it is ambiguous."""
    found = [sign for sign in SEPARATORS if sign in _QUOTED.sub("", header)]
    if len(found) > 1:
        raise ValueError(f"{place}: the columns must be separated by commas, by semicolons or by tabs, got "
                         f"{' and '.join(f'a {SEPARATORS[sign]}' for sign in found)} in {header.strip()[:80]!r}; write "
                         "only one of them into the header")
    return found[0] if found else ","


def _header(cells: list[str], place: str) -> list[str]:
    header = [name.strip().lower() for name in cells]
    twice = [name for name in header if name and header.count(name) > 1]
    if twice:
        raise ValueError(f"{place}: the header contains column '{twice[0]}' twice; rename one of them")
    return header


def _row(header: list[str], cells: list[str], place: str, separator: str) -> dict[str, str]:
    """Return a row as {column: text}. Raises ValueError if the number of cells is wrong or a text has no column."""
    if len(cells) != len(header):
        raise ValueError(f"{place}: {len(header)} columns expected, got {len(cells)}: put a text that contains a "
                         f'{separator} into "quotes"')
    for number, (name, cell) in enumerate(zip(header, cells, strict=True), 1):
        if not name and cell.strip():
            raise ValueError(f"{place}: column {number} contains {cell[:40]!r}, but has no name in the header; name "
                             "the column or remove it (pandas leaves it out with to_csv(index=False))")
    return {name: cell for name, cell in zip(header, cells, strict=True) if name}


def read_published_tsv(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield (place, row) for each line of a published TSV file in which only some texts with quotes are quoted.

    `place` is file and line, and `row` maps column names to texts. Raises ValueError, which names this place, if the
    header lacks one of `columns` or a row is not valid.
    """
    with open_text(path, newline="\n") as file:
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


def expect(value: Any, kind: type[Kind], place: str) -> Kind:
    """Return the value if it is of type `kind`, otherwise raise ValueError, which names `place`.

    If the value is a string, each lone surrogate (half of a UTF-16 character) in it is replaced by U+FFFD.
    """
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{place}: {_NAMES[kind]} expected, got {json.dumps(value, ensure_ascii=False)[:60]}; {CURE}")
    return _HALF_CHARACTER.sub("\ufffd", value) if isinstance(value, str) else value  # type: ignore[return-value]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} occurs twice in one object")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


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
        except (ValueError, RecursionError) as error:
            raise _broken(place, str(error)) from None


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


def _broken(place: str, reason: str, cure: str = CURE) -> ValueError:
    return ValueError(f"{place}: not valid JSON ({reason}): {cure}")
