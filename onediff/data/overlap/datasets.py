"""Reads a data set of any supported format as examples, each with texts and images, for the leak audit.

Three formats are supported: a folder of DiffCap shards; the folder of a published data set, or of a user's own pairs;
and a JSON or JSON Lines file of LLaVA conversations with any number of images each, such as M4-Instruct.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onediff.data.quality.probe import read_group, row_groups
from onediff.data.record import Record, read_row_group
from onediff.data.sources.entries import identity, part
from onediff.data.sources.published import split_of
from onediff.data.sources.read import open_source, reader_of
from onediff.data.sources.readers.folder import TABLES
from onediff.files import find_file
from onediff.inputs.prompt import IMAGE
from onediff.text_files import expect, read_lines, read_list

ANNOTATIONS = (".json", ".jsonl")
_FORM = '{"id", "image": "a.jpg" or ["a.jpg", "b.jpg"], "conversations": [{"from", "value"}, ...]}'


@dataclass(frozen=True)
class Example:
    """One row of a data set: texts, and images as (name, path or content); None for an image that is missing.

    `name` identifies the row, and `source` is the data set or benchmark to which it belongs.
    """

    name: str
    source: str
    texts: tuple[str, ...]
    images: tuple[tuple[str, Path | bytes | None], ...]


@dataclass(frozen=True)
class ExampleGroup:
    """A reference to one row group of a DiffCap shard, whose records are read in the process that needs them."""

    shard: Path
    number: int
    split: str

    def examples(self) -> list[Example]:
        """Read the row group from disk, and return the examples of the records that belong to `split`."""
        return [_of_record(record) for record in read_group(self.shard, self.number) if record.split == self.split]


def read_examples(path: Path, *, split: str, scratch: Path, source: str | None = None,
                  images: Path | None = None) -> Iterator[Example | ExampleGroup]:
    """Yield the examples of one split of the data set at `path`; a file of LLaVA conversations has no splits.

    Archives are unpacked below `scratch`. `source` is the name of the published data set, by default the name of the
    folder. `images` is the folder with the images of LLaVA conversations, by default the folder of the file. Raises
    FileNotFoundError if a path does not exist, and ValueError for a malformed row or if there is no row.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: give a folder of DiffCap shards, the folder of a published "
                                "data set, or a JSON file of LLaVA conversations")
    if path.is_file():
        yield from _conversations(path, images or path.parent)
        return
    counts: Counter[str] = Counter()  # split -> number of pairs
    if any(path.glob("*.parquet")):
        for shard, number, _, _ in row_groups([path]):
            splits = read_row_group(shard, number, ["split"]).column("split").to_pylist()
            counts.update(splits)
            if split in splits:
                yield ExampleGroup(shard, number, split)
    else:
        yield from _published(path, source or path.resolve().name, split, scratch, counts)
    if not counts[split]:
        available = ", ".join(f"{name} ({count:,})" for name, count in counts.items()) or "none at all"
        raise ValueError(f"{path}: no pair in split '{split}'; the splits with pairs are: {available}; choose one of "
                         "them with --split (for the benchmark) or --train-split")


def _of_record(record: Record) -> Example:
    """Convert a DiffCap record to an example for the leak audit."""
    names = record.provenance.get("names")
    if not isinstance(names, list) or len(names) < 2:
        names = [*(names if isinstance(names, list) else []), "before", "after"][: record.num_images]
    images = zip(map(str, names), record.images, strict=False)
    return Example(record.pair_id, record.source, (*record.references, *_answers(record.provenance)),
                   tuple((name, content or None) for name, content in images))


def _published(folder: Path, source: str, split: str, scratch: Path, counts: Counter[str]) -> Iterator[Example]:
    """Yield the examples of one split of a published data set, and count the pairs of every split in `counts`."""
    files = open_source(source, folder, scratch)
    try:
        read = reader_of(source, files)
    except ValueError:
        raise ValueError(f"{folder}: must contain DiffCap shards (*.parquet) or {' or '.join(TABLES)}, or be a "
                         f"published data set; '{source}' is not the name of one: give the name with --train-source or "
                         "--source, as 'onediff data status' prints it") from None
    for pair in read(files):
        pair_split = split_of(source, pair)
        counts[pair_split] += 1
        if pair_split == split:
            yield Example(f"{source}-{pair.official_split}-{pair.official_id}", source,
                          (*pair.references, *_answers(pair.provenance)),
                          tuple(zip(pair.names, pair.locate(files), strict=True)))


def _answers(provenance: dict[str, Any]) -> list[str]:
    """Return the answers of the conversation of a record; an empty list for other records."""
    turns = provenance.get("conversation")
    return [str(turn[1]) for turn in turns if len(turn) == 2] if isinstance(turns, list) else []


def _conversations(path: Path, images: Path) -> Iterator[Example]:
    """Yield the examples of a file of LLaVA conversations; `images` is the folder with the images."""
    if path.suffix.lower() not in ANNOTATIONS:
        raise ValueError(f"{path}: the file name must end in {' or '.join(ANNOTATIONS)}, got '{path.suffix}'; give a "
                         "JSON file of LLaVA conversations")
    if not images.is_dir():
        raise FileNotFoundError(f"{images} is not a folder: give the folder that contains the images with --images")
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
                tuple((name, find_file(images / name))
                      for name in (expect(name, str, f"{place}, image") for name in names)))
    except ValueError as error:
        raise ValueError(f"{error}; the file must be a list of LLaVA conversations: {_FORM}") from None
    if is_empty:
        raise ValueError(f"{path}: the file has no row; it must be a list of LLaVA conversations: {_FORM}")
