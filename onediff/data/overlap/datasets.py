"""Any set of pairs or conversations, ours or others', as rows of texts and images, in the form that it comes in.

Folders of DiffCap shards; folders as published, or of one's own pairs; a JSON list (or JSON lines) of LLaVA's rows with
any number of images each, as M4-Instruct publishes them.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from onediff.data.quality.probe import read_group, row_groups
from onediff.data.record import Record
from onediff.data.sources.entries import expect, identity, part, read_lines, read_list
from onediff.data.sources.published import split_of
from onediff.data.sources.read import open_source, reader_of
from onediff.data.sources.readers.folder import TABLES
from onediff.inputs.prompt import IMAGE

ANNOTATIONS = (".json", ".jsonl")
_FORM = '{"id", "image": "a.jpg" or ["a.jpg", "b.jpg"], "conversations": [{"from", "value"}, ...]}'
_CURE = "; take the file as published"  # what readers of published sets say; others' files are published otherwise


@dataclass(frozen=True)
class Row:
    """`images`: how each is called, and where it lies or what it holds; None: missing. `source`: its benchmark."""

    name: str
    source: str
    texts: tuple[str, ...]
    images: tuple[tuple[str, Path | bytes | None], ...]


@dataclass(frozen=True)
class RowGroup:
    """Rows of a shard of DiffCap records, which whoever wants them reads."""

    shard: Path
    number: int
    split: str

    def rows(self) -> list[Row]:
        return [_of_record(record) for record in read_group(self.shard, self.number) if record.split == self.split]


def rows_of(path: Path, *, split: str, scratch: Path, source: str | None = None,
            images: Path | None = None) -> Iterator[Row | RowGroup]:
    """The rows of one split; LLaVA's rows have none, so all of them. Archives are unpacked below `scratch`, once.

    `source` names the published set where the folder is not called so; `images` is where LLaVA's rows have theirs, by
    default the folder of the file. Raises FileNotFoundError, or ValueError naming file and entry, or for
    no row.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} not found: give a folder of shards, a folder as published, or a JSON of "
                                "LLaVA's rows")
    if path.is_file():
        yield from _conversations(path, images or path.parent)
    elif any(path.glob("*.parquet")):
        yield from _shards(path, split)
    else:
        yield from _published(path, source or path.resolve().name, split, scratch)


def _shards(folder: Path, split: str) -> Iterator[RowGroup]:
    seen: Counter[str] = Counter()
    for path, number, _, _ in row_groups([folder]):
        splits = pq.ParquetFile(path).read_row_group(number, columns=["split"]).column("split").to_pylist()
        seen.update(splits)
        if split in splits:
            yield RowGroup(path, number, split)
    _need(split, seen, folder)


def _need(split: str, seen: Counter[str], folder: Path) -> None:
    if not seen[split]:
        there = ", ".join(f"{name} ({count:,})" for name, count in seen.items()) or "none at all"
        raise ValueError(f"{folder}: no pair in split '{split}'; it has {there}: name another with --split (of the "
                         "benchmark) or --train-split")


def _of_record(record: Record) -> Row:
    names = record.provenance.get("names")
    named = [str(name) for name in names] if isinstance(names, list) else []
    called = (*named, "before", "after")[: record.num_images] if len(named) < 2 else tuple(named)
    sides = zip(called, record.images, strict=False)
    return Row(record.pair_id, record.source, (*record.references, *_answers(record.provenance)),
               tuple((name, content or None) for name, content in sides))


def _published(folder: Path, source: str, split: str, scratch: Path) -> Iterator[Row]:
    files = open_source(source, folder, scratch)
    try:
        read = reader_of(source, files)
    except ValueError:
        raise ValueError(f"{folder}: no shard (*.parquet), no {' or '.join(TABLES)}, and '{source}' is no published "
                         "set: name it with --train-source or --source, as 'onediff data status' calls it") from None
    seen: Counter[str] = Counter()
    for pair in read(files):
        its = split_of(source, pair)
        seen[its] += 1
        if its == split:
            found = zip(pair.names, pair.locate(files), strict=True)
            yield Row(f"{source}-{pair.official_split}-{pair.official_id}", source,
                      (*pair.references, *_answers(pair.provenance)), tuple(found))
    _need(split, seen, folder)


def _answers(provenance: dict[str, Any]) -> list[str]:
    turns = provenance.get("conversation")
    return [str(turn[1]) for turn in turns if len(turn) == 2] if isinstance(turns, list) else []


def _conversations(path: Path, images: Path) -> Iterator[Row]:
    if path.suffix.lower() not in ANNOTATIONS:
        raise ValueError(f"{path}: {' or '.join(ANNOTATIONS)} is read, got '{path.suffix}'; give LLaVA's rows as JSON")
    if not images.is_dir():
        raise FileNotFoundError(f"{images} not found, or no folder: --images names the folder that the rows' images "
                                "are in")
    any_row = False
    try:
        for place, entry in (read_lines if path.suffix.lower() == ".jsonl" else read_list)(path):
            any_row = True
            yield _conversation(entry, place, path, images)
    except ValueError as error:
        raise ValueError(f"{str(error).removesuffix(_CURE)}; a list of LLaVA's rows is read: {_FORM}") from None
    if not any_row:
        raise ValueError(f"{path}: no row in it; a list of LLaVA's rows is read: {_FORM}")


def _conversation(entry: dict[str, Any], place: str, path: Path, images: Path) -> Row:
    names = entry.get("image") or []
    listed = [names] if isinstance(names, str) else expect(names, list, f"{place}, image")
    turns = [expect(turn, dict, f"{place}, conversations") for turn in part(entry, "conversations", list, place)]
    said = (part(turn, "value", str, f"{place}, conversations").replace(IMAGE, " ") for turn in turns)
    found = ((name, images / name if os.path.isfile(images / name) else None)
             for name in (expect(name, str, f"{place}, image") for name in listed))
    return Row(identity(entry, "id", place) if "id" in entry else place, path.stem, tuple(said), tuple(found))
