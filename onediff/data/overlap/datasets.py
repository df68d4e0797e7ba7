"""Reads any set of pairs or conversations as examples of texts and images.

Folders of DiffCap shards; folders as published, or of your own pairs; a JSON list (or JSON lines) of LLaVA's rows with
any number of images each, as M4-Instruct publishes them.
"""

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
_CURE = "; take the file as published"  # the end of the errors of entries.py, which is no cure for these files


@dataclass(frozen=True)
class Example:
    """`images`: the name of each, and its path or content; None: missing. `source`: the benchmark."""

    name: str
    source: str
    texts: tuple[str, ...]
    images: tuple[tuple[str, Path | bytes | None], ...]


@dataclass(frozen=True)
class ExampleGroup:
    """The examples of a row group of DiffCap records; the process that needs them reads them."""

    shard: Path
    number: int
    split: str

    def examples(self) -> list[Example]:
        return [_of_record(record) for record in read_group(self.shard, self.number) if record.split == self.split]


def read_examples(path: Path, *, split: str, scratch: Path, source: str | None = None,
                  images: Path | None = None) -> Iterator[Example | ExampleGroup]:
    """The examples of one split; LLaVA's rows have no splits, so all of them. Archives are unpacked below `scratch`.

    `source` names the published set where the folder has another name; `images` is the folder of the images of LLaVA's
    rows, by default the folder of the file. Raises FileNotFoundError, or ValueError naming file and entry, or for no
    row.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: give a folder of shards, the folder of a published dataset, "
                                "or a JSON file with rows of LLaVA")
    if path.is_file():
        yield from _conversations(path, images or path.parent)
        return
    counts: Counter[str] = Counter()  # of each split
    if any(path.glob("*.parquet")):
        for shard, number, _, _ in row_groups([path]):
            splits = pq.ParquetFile(shard).read_row_group(number, columns=["split"]).column("split").to_pylist()
            counts.update(splits)
            if split in splits:
                yield ExampleGroup(shard, number, split)
    else:
        yield from _published(path, source or path.resolve().name, split, scratch, counts)
    if not counts[split]:
        available = ", ".join(f"{name} ({count:,})" for name, count in counts.items()) or "none at all"
        raise ValueError(f"{path}: no pair in split '{split}'; it has {available}: name another with --split (of the "
                         "benchmark) or --train-split")


def _of_record(record: Record) -> Example:
    names = record.provenance.get("names")
    if not isinstance(names, list) or len(names) < 2:
        names = [*(names if isinstance(names, list) else []), "before", "after"][: record.num_images]
    images = zip(map(str, names), record.images, strict=False)
    return Example(record.pair_id, record.source, (*record.references, *_answers(record.provenance)),
                   tuple((name, content or None) for name, content in images))


def _published(folder: Path, source: str, split: str, scratch: Path, counts: Counter[str]) -> Iterator[Example]:
    files = open_source(source, folder, scratch)
    try:
        read = reader_of(source, files)
    except ValueError:
        raise ValueError(f"{folder}: no shard (*.parquet), no {' or '.join(TABLES)}, and '{source}' is no published "
                         "set: name it with --train-source or --source, as 'onediff data status' calls it") from None
    for pair in read(files):
        pair_split = split_of(source, pair)
        counts[pair_split] += 1
        if pair_split == split:
            yield Example(f"{source}-{pair.official_split}-{pair.official_id}", source,
                          (*pair.references, *_answers(pair.provenance)),
                          tuple(zip(pair.names, pair.locate(files), strict=True)))


def _answers(provenance: dict[str, Any]) -> list[str]:
    turns = provenance.get("conversation")
    return [str(turn[1]) for turn in turns if len(turn) == 2] if isinstance(turns, list) else []


def _conversations(path: Path, images: Path) -> Iterator[Example]:
    if path.suffix.lower() not in ANNOTATIONS:
        raise ValueError(f"{path}: {' or '.join(ANNOTATIONS)} is read, got '{path.suffix}'; give LLaVA's rows as JSON")
    if not images.is_dir():
        raise FileNotFoundError(f"{images} does not exist or is not a folder: set --images to the folder that contains "
                                "the images of the rows")
    is_empty = True
    try:
        for place, entry in (read_lines if path.suffix.lower() == ".jsonl" else read_list)(path):
            is_empty = False
            names = entry.get("image") or []
            names = [names] if isinstance(names, str) else expect(names, list, f"{place}, image")
            turns = [expect(turn, dict, f"{place}, conversations")
                     for turn in part(entry, "conversations", list, place)]
            yield Example(
                identity(entry, "id", place) if "id" in entry else place, path.stem,
                tuple(part(turn, "value", str, f"{place}, conversations").replace(IMAGE, " ") for turn in turns),
                tuple((name, images / name if os.path.isfile(images / name) else None)
                      for name in (expect(name, str, f"{place}, image") for name in names)))
    except ValueError as error:
        raise ValueError(f"{str(error).removesuffix(_CURE)}; a list of LLaVA's rows is read: {_FORM}") from None
    if is_empty:
        raise ValueError(f"{path}: no row in it; a list of LLaVA's rows is read: {_FORM}")
