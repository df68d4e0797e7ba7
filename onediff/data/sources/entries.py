"""Reads values from the entries of annotation files, and reports errors with file and line.

`onediff.text_files` reads the entries themselves. A `place` is the position of an entry for messages, such as
"a.csv line 3".
"""

import re
from typing import Any

from onediff.text_files import CURE, Kind, expect

_ADDRESS = re.compile(r"(?!file:)[a-z][a-z0-9+.-]*://|data:", re.IGNORECASE)


def part(entry: dict[str, Any], key: str, kind: type[Kind], place: str) -> Kind:
    """Return entry[key]. Raises ValueError if the entry lacks this key or the value is not of type `kind`."""
    if key not in entry:
        raise ValueError(f"{place}: '{key}' is missing, got only {', '.join(sorted(entry)) or 'an empty entry'}; "
                         f"{CURE}")
    return expect(entry[key], kind, f"{place}, {key}")


def identity(entry: dict[str, Any], key: str, place: str) -> str:
    """Return the identifier entry[key] as a string, because some files store it as "1001" and other files as 1001."""
    value = entry.get(key)
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else part(entry, key, str, place)


def is_address(name: str) -> bool:
    """Return whether the name of an image is an address in the web or a data URI, and not a path."""
    return _ADDRESS.match(name) is not None


def one_line(text: str) -> str:
    """Return the text on one line, with single spaces between the words."""
    return " ".join(text.split())


def sentences(values: list[Any], place: str) -> tuple[list[str], int]:
    """Return the sentences in `values` that are not empty, and the number of empty sentences.

    Each returned sentence is on one line. Raises ValueError, which names `place`, if a value is not a string.
    """
    texts = [one_line(expect(value, str, place)) for value in values]
    return [text for text in texts if text], texts.count("")
