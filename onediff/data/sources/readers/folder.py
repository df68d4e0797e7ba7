"""Reads users' own pairs: a folder with images and a table, pairs.csv or pairs.jsonl.

Required columns: `before` and `after` (paths below the folder, or bare file names) and `references` (in CSV, sentences
separated by "|", or one column each: reference, reference_2, ...; in JSONL, a list or a text).
Optional columns: `split` (train, val, gate or test), `group` (pairs of one group get the same split), `change_type`,
`instruction` and `pair_id`.
"""

import re
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import Any

from onediff.data.record import SPLITS, digest
from onediff.data.sources.entries import one_line, part, sentences
from onediff.data.sources.published import NO_TYPE, Files, PublishedPair
from onediff.inputs.prompt import DEFAULT_INSTRUCTION
from onediff.text_files import expect, read_lines, read_table

TABLES = ("pairs.csv", "pairs.jsonl")
SHARES = {"train": 80, "val": 5, "gate": 5, "test": 10}  # percent of the groups in each split, for rows without a split
_OPTIONAL = ("split", "change_type", "instruction", "group", "pair_id")
_REFERENCE = re.compile(r"references?|reference_\d+")


def read(files: Files) -> Iterator[PublishedPair]:
    """Yield the pairs of the user's table, pairs.csv or pairs.jsonl.

    Raises ValueError, which names the file and the line, if a row is not valid. Raises FileNotFoundError if there is no
    table.
    """
    tables = [path for path in map(files.named, TABLES) if path] or [files.require(*TABLES)]
    if len(tables) == 2:
        raise ValueError(f"{tables[0]} and {tables[1]}: the folder must contain one table of pairs; remove one of the "
                         "two files")
    places: dict[str, str] = {}
    for number, (place, row) in enumerate(_rows(tables[0]), 1):
        pair = _pair(row, number, place)
        if pair.official_id in places:
            raise ValueError(f"{place}: pair_id '{pair.official_id}' is already used in {places[pair.official_id]}; "
                             "give each pair another pair_id")
        places[pair.official_id] = place
        yield pair
    if not places:
        raise ValueError(f"{tables[0]}: the table contains no pair; write one line for each pair")


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if path.suffix == ".jsonl":
        return read_lines(path)
    return _csv_rows(path)


def _csv_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (file and line, row) for each row of pairs.csv. An error about a column name points to line 1."""
    for number, (place, row) in enumerate(read_table(path)):
        if number == 0:
            header = f"{path} line 1"
            _check_columns(row, header)
            for side in ("before", "after"):
                part(row, side, str, header)
        yield place, row | {"references": row["references"].split("|") if row.get("references") else []}


def _check_columns(row: dict[str, Any], place: str) -> None:
    """Raise ValueError, which names `place`, if the row has a column that a table of pairs must not have."""
    unknown = [key for key in row if key not in ("before", "after", *_OPTIONAL) and not _REFERENCE.fullmatch(key)]
    if unknown:
        raise ValueError(f"{place}: unknown column '{unknown[0]}'; allowed are before, after, references, reference, "
                         f"reference_2, reference_3 and so on, {', '.join(_OPTIONAL)}")


def _pair(row: dict[str, Any], number: int, place: str) -> PublishedPair:
    """Return the pair that a row of the table describes.

    Raises ValueError, which names the row and the column, if a value in the row is not valid.
    """
    _check_columns(row, place)
    before, after = (_name(row, side, place) for side in ("before", "after"))
    texts = {key: one_line(expect(row.get(key) or "", str, f"{place}, {key}")) for key in _OPTIONAL}
    group = texts["group"] or f"{before}|{after}"
    split = {"valid": "val", "validation": "val"}.get(texts["split"], texts["split"]) or divided(group)
    if split not in SPLITS:
        raise ValueError(f"{place}: split must be one of {', '.join(SPLITS)} or empty, got '{split}'; correct the cell")
    references, empty = _references(row, place)
    if split != "train" and not references:
        raise ValueError(f"{place}: a pair of split {split} must have a reference, because this split is scored; add "
                         "a reference, or set split to train")
    return PublishedPair(texts["pair_id"] or f"{number:06d}", split, (before, after), references, group, split=split,
                         change_type=texts["change_type"] or NO_TYPE, num_empty=empty, exact=True,
                         instruction=texts["instruction"] or DEFAULT_INSTRUCTION)


def divided(group: str) -> str:
    """Return the split of a group of pairs. Only a digest of the group name decides, so new pairs do not change it."""
    place = int(digest(group.encode()), 16) % 100
    return next(split for split, end in zip(SHARES, accumulate(SHARES.values()), strict=True) if place < end)


def _name(row: dict[str, Any], side: str, place: str) -> str:
    """Return the image path in column `side` of the row. Raises ValueError if the path leads outside the folder."""
    name = part(row, side, str, place).strip()
    path = PurePosixPath(name.replace("\\", "/"))
    if not name or path.is_absolute() or ".." in path.parts or Path(name).is_absolute():
        raise ValueError(f"{place}: {side} must be a path below the folder, such as images/1_before.png, got '{name}'; "
                         "correct the path")
    return str(path)


def _references(row: dict[str, Any], place: str) -> tuple[list[str], int]:
    """Return the sentences of all reference columns, and the number of empty sentences in column `references`."""
    texts = row.get("references") or []
    listed = [texts] if isinstance(texts, str) else expect(texts, list, f"{place}, references")
    columns = [row[key] for key in row if _REFERENCE.fullmatch(key) and key != "references"]
    return sentences([*listed, *(text for text in columns if text)], f"{place}, references")
