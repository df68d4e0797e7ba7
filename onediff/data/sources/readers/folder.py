"""Reads users' own pairs: a folder with images and a table, pairs.csv or pairs.jsonl.

Required columns: `before` and `after` (paths below the folder, or bare file names) and `references` (in CSV, sentences
separated by "|", or one column each: reference, reference_2, ...; in JSONL, a list or a text).
Optional columns: `split` (train, val, gate or test), `group` (pairs of one group get the same split), `change_type`,
`instruction` and `pair_id`.

Rows with equal images and an equal instruction are one pair. So a table may also have one row for each sentence.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import Any

from onediff.data.record import SPLITS, digest
from onediff.data.sources.entries import identity, is_address, one_line, part, sentences
from onediff.data.sources.published import NO_TYPE, Files, PublishedPair
from onediff.inputs.prompt import DEFAULT_INSTRUCTION
from onediff.text_files import expect, read_lines, read_table

TABLES = ("pairs.csv", "pairs.jsonl")
SHARES = {"train": 80, "val": 5, "gate": 5, "test": 10}  # percent of the groups in each split, for rows without a split
_NEEDED = ("train", "test", "gate", "val")  # the splits, the most important first
_NAMES = ("pair_id", "group", "split")  # columns with a name, which may be a number
_TEXTS = ("change_type", "instruction")
_OPTIONAL = ("split", "change_type", "instruction", "group", "pair_id")
_REFERENCE = re.compile(r"references?|reference_\d+")
_DRIVE = re.compile(r"[a-z]:[\\/]", re.IGNORECASE)


@dataclass(frozen=True)
class OwnPair:
    """A pair of a user's table, with the values as they are in the table: a text is "" if its column or cell is empty.

    `places` lists the rows that were merged into this pair, as file and line. `number` is the number of its first row.
    """

    before: str
    after: str
    references: list[str]
    num_empty: int
    places: tuple[str, ...]
    number: int
    pair_id: str = ""
    group: str = ""
    split: str = ""
    change_type: str = ""
    instruction: str = ""

    @property
    def official_id(self) -> str:
        return self.pair_id or f"{self.number:06d}"

    @property
    def group_name(self) -> str:
        return self.group or f"{self.before}|{self.after}"


def read(files: Files) -> Iterator[PublishedPair]:
    """Yield the pairs of the user's table, pairs.csv or pairs.jsonl.

    Raises ValueError, which names the file and the line, if a row is not valid. Raises FileNotFoundError if there is no
    table.
    """
    return (pair for _, pair in read_own(files))


def read_own(files: Files) -> Iterator[tuple[OwnPair, PublishedPair]]:
    """Yield each pair of the user's table twice: as it is in the table, and as `read` yields it."""
    tables = [path for path in map(files.named, TABLES) if path] or [files.require(*TABLES)]
    if len(tables) == 2:
        raise ValueError(f"{tables[0]} and {tables[1]}: the folder must contain one table of pairs; remove one of the "
                         "two files")
    pairs = _merged(_pair(row, number, place) for number, (place, row) in enumerate(_rows(tables[0]), 1))
    if not pairs:
        raise ValueError(f"{tables[0]}: the table contains no pair; write one line for each pair")
    has_references: dict[str, bool] = {}
    for pair in pairs:
        if not pair.split:
            has_references[pair.group_name] = bool(pair.references) and has_references.get(pair.group_name, True)
    splits = assign_splits(has_references, taken={pair.split for pair in pairs if pair.split})
    for pair in pairs:
        split = pair.split or splits[pair.group_name]
        if split != "train" and not pair.references:
            raise ValueError(f"{pair.places[0]}: a pair of split {split} must have a reference, because this split is "
                             "scored; add a reference, or set split to train")
        yield pair, PublishedPair(
            pair.official_id, split, (pair.before, pair.after), pair.references, pair.group_name, split=split,
            change_type=pair.change_type or NO_TYPE, instruction=pair.instruction or DEFAULT_INSTRUCTION,
            num_records=len(pair.places), num_empty=pair.num_empty, exact=True)


def assign_splits(groups: Mapping[str, bool], taken: Collection[str]) -> dict[str, str]:
    """Return the split of each group of pairs without a split.

    `groups` says of each group whether all of its pairs have references, without which only `train` is possible.
    `taken` are the splits of other pairs of the table. A digest of the name decides, so new groups do not move others.
    But a split without any pair gets the group with the smallest digest from the split with most groups. No group is
    taken if `train` would keep less than half of the groups, or if a more important split would keep none.
    """
    splits = {group: divided(group) for group in groups}
    for number, needed in enumerate(_NEEDED):
        counts = Counter(splits.values())
        if needed in taken or counts[needed]:
            continue
        donors = [split for split in counts if counts[split] > 1 or split in _NEEDED[number:]]
        if 2 * (counts["train"] - 1) < len(splits):
            donors = [split for split in donors if split != "train"]
        movable = [group for group in splits if splits[group] in donors and (needed == "train" or groups[group])]
        if movable:
            splits[min(movable, key=lambda group: (-counts[splits[group]], digest(group.encode())))] = needed
    return splits


def divided(group: str) -> str:
    """Return the split of a group of pairs by a digest of the name of the group."""
    place = int(digest(group.encode()), 16) % 100
    return next(split for split, end in zip(SHARES, accumulate(SHARES.values()), strict=True) if place < end)


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if path.suffix == ".jsonl":
        return read_lines(path)
    return _table_rows(path)


def _table_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
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


def _pair(row: dict[str, Any], number: int, place: str) -> OwnPair:
    """Return the pair that a row of the table describes.

    Raises ValueError, which names the row and the column, if a value in the row is not valid.
    """
    _check_columns(row, place)
    before, after = (_name(row, side, place) for side in ("before", "after"))
    present = {key: value for key, value in row.items() if value is not None}
    names = {key: one_line(identity(present, key, place)) for key in _NAMES if key in present}
    texts = {key: one_line(part(present, key, str, place)) for key in _TEXTS if key in present}
    split = names.get("split", "")
    names["split"] = {"valid": "val", "validation": "val"}.get(split.lower(), split.lower())
    if names["split"] not in ("", *SPLITS):
        raise ValueError(f"{place}: split must be one of {', '.join(SPLITS)} or empty, got '{split}'; correct the cell")
    references, num_empty = _references(present, place)
    return OwnPair(before, after, references, num_empty, (place,), number, **names, **texts)


def _merged(rows: Iterator[OwnPair]) -> list[OwnPair]:
    """Merge rows with equal images and an equal instruction into one pair.

    Raises ValueError, which names both rows, if their other values differ, or if two pairs have one pair_id.
    """
    pairs: dict[tuple[str, str, str], OwnPair] = {}
    for row in rows:
        key = (row.before, row.after, row.instruction or DEFAULT_INSTRUCTION)
        first = pairs.setdefault(key, row)
        if first is row:
            continue
        values = {name: getattr(first, name) or getattr(row, name) for name in (*_NAMES, *_TEXTS)}
        for name in ("pair_id", "group", "split", "change_type"):
            if getattr(row, name) not in ("", values[name]):
                raise ValueError(f"{row.places[0]}: rows with equal images are one pair, so {name} must be "
                                 f"'{values[name]}', as in {first.places[0]}, got '{getattr(row, name)}'; write equal "
                                 "values, or different instructions if these are different questions")
        pairs[key] = replace(first, references=first.references + row.references, places=first.places + row.places,
                             num_empty=first.num_empty + row.num_empty, **values)
    places: dict[str, str] = {}
    for pair in pairs.values():
        place = places.setdefault(pair.official_id, pair.places[0])
        if place != pair.places[0]:
            raise ValueError(f"{pair.places[0]}: pair_id '{pair.official_id}' is already used in {place}; give each "
                             "pair another pair_id")
    return list(pairs.values())


def _name(row: dict[str, Any], side: str, place: str) -> str:
    """Return the image path in column `side` of the row. Raises ValueError if it is no path below the folder."""
    name = part(row, side, str, place).strip()
    if is_address(name):
        raise ValueError(f"{place}: {side} must be an image file below the folder, got the address '{name[:200]}'; "
                         "download the image, and write the path of the file")
    path = PurePosixPath(name.replace("\\", "/"))
    if not name or path.is_absolute() or ".." in path.parts or _DRIVE.match(name) or name.startswith("file:"):
        raise ValueError(f"{place}: {side} must be a path below the folder, such as images/1_before.png, got '{name}'; "
                         "correct the path")
    return str(path)


def _references(row: dict[str, Any], place: str) -> tuple[list[str], int]:
    """Return the sentences of all reference columns, and the number of empty sentences in column `references`."""
    texts = row.get("references", [])
    listed = list(filter(None, [texts])) if isinstance(texts, str) else expect(texts, list, f"{place}, references")
    columns = [row[key] for key in row if _REFERENCE.fullmatch(key) and key != "references"]
    return sentences([*listed, *(text for text in columns if text != "")], f"{place}, references")
