"""The records that a phase trains on: texts in memory, image files in one file in scratch, read by place.

So memory does not grow with the images, and a batch can draw any of them without decoding a whole shard.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from onediff.data.record import Record, digest, read_records
from onediff.files import new_folder, waiting_lock

_RECORDS, _IMAGES = "kept.jsonl", "images.bin"


@dataclass(frozen=True)
class Sample:
    """A record without its pixels: images by digest, in order; `turns` are a conversation's, empty for a pair."""

    pair_id: str
    source: str
    images: tuple[str, ...]
    references: list[str]
    instruction: str
    turns: tuple[tuple[str, str], ...] = ()


class ImageFiles:
    """Image files by digest, each once, one after the other in a file."""

    def __init__(self, path: Path, places: dict[str, tuple[int, int]]) -> None:
        self.places, self._file = places, os.open(path, os.O_RDONLY)

    def __getitem__(self, name: str) -> bytes:
        start, size = self.places[name]
        return os.pread(self._file, size, start)

    def __del__(self) -> None:
        os.close(self._file)


@dataclass
class Corpus:
    """The records of one split: samples, captions of single images by source and digest, image files by digest."""

    samples: list[Sample]
    captions: dict[str, dict[str, str]]
    source_of: dict[str, str]
    files: ImageFiles

    @classmethod
    def read(cls, folder: Path, split: str, sources: Iterable[str], *, store: Path) -> Corpus:
        """DiffCap's shards -> a corpus, stored in the folder `store`, from which later starts and other ranks read it.

        Raises ValueError if a source has nothing in the split, OSError if the disk is full.
        """
        with waiting_lock(store.with_suffix(".lock")):
            if not store.exists():
                _write(store, (r for r in read_records(folder, f"{split}-*.parquet") if r.source in set(sources)))
        samples: list[Sample] = []
        captions: dict[str, dict[str, str]] = {}
        source_of: dict[str, str] = {}
        places: dict[str, tuple[int, int]] = {}
        for row in map(json.loads, (store / _RECORDS).open(encoding="utf-8")):
            sample = Sample(**row["sample"] | {"images": tuple(row["sample"]["images"]),
                                               "turns": tuple((q, a) for q, a in row["sample"]["turns"])})
            samples.append(sample)
            places |= {name: (start, size) for name, start, size in row["new"]}
            source_of |= dict.fromkeys(sample.images, sample.source)
            captions.setdefault(sample.source, {}).update(row["captions"])
        for source in sorted(set(sources) - {sample.source for sample in samples}):
            raise ValueError(f"{folder}: source '{source}' has no pair in split {split}; raise its number of pairs "
                             "or leave it out")
        return cls(samples, captions, source_of, ImageFiles(store / _IMAGES, places))


def _write(store: Path, records: Iterable[Record]) -> None:
    """Writes one line for each record; `new` in it are the name, start and size of each image that came with it."""
    stored: set[str] = set()
    with (new_folder(store) as part, (part / _IMAGES).open("wb") as images,
          (part / _RECORDS).open("w", encoding="utf-8") as lines):
        for record in tqdm(records, desc="corpus", unit="pair"):
            names, new = tuple(digest(content) for content in record.images), []
            for name, content in zip(names, record.images, strict=True):
                if name not in stored:
                    stored.add(name)
                    new.append((name, images.tell(), images.write(content)))
            captions = record.provenance.get("captions", [None] * len(names))
            sample = Sample(record.pair_id, record.source, names, record.references, record.instruction,
                            tuple(record.provenance.get("conversation", ())))
            lines.write(json.dumps({
                "sample": asdict(sample), "new": new,
                "captions": {name: text for name, text in zip(names, captions, strict=True) if text}}) + "\n")
