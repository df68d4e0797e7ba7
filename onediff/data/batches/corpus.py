"""The corpus: the records that a training phase draws from, in a form that allows random access.

Texts are held in memory. The encoded images are stored one after another in a single file in scratch and are read by
position, so that memory does not grow with the images and no batch has to decode a Parquet shard.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tqdm import tqdm

from onediff.data.batches.targets import Facts, facts_of
from onediff.data.record import Record, digest, read_records
from onediff.files import new_folder, waiting_lock
from onediff.text_files import json_lines

_RECORDS, _IMAGES = "kept.jsonl", "images.bin"


@dataclass(frozen=True)
class Sample:
    """One record of a training corpus, without the image bytes.

    `images` holds the digests of the images in order. `turns` holds the (question, answer) turns of a conversation, and
    is empty if the record is not a conversation. `facts` holds what is known about the change of a pair (targets.py).
    """

    pair_id: str
    source: str
    images: tuple[str, ...]
    references: list[str]
    instruction: str
    turns: tuple[tuple[str, str], ...] = ()
    facts: Facts = field(default_factory=dict)


class ImageFiles:
    """Read access to one file that contains many PNG or JPEG images: returns the bytes of an image by its digest."""

    def __init__(self, path: Path, positions: dict[str, tuple[int, int]]) -> None:
        """Open the file. `positions` maps the digest of an image to its (offset, size) in the file, in bytes."""
        self.positions, self._file = positions, os.open(path, os.O_RDONLY)

    def __getitem__(self, name: str) -> bytes:
        offset, size = self.positions[name]
        # Unlike seek and read, pread is safe when forked worker processes share this file descriptor.
        return os.pread(self._file, size, offset)

    def __del__(self) -> None:
        os.close(self._file)


@dataclass
class Corpus:
    """The training data of one split: its samples, the captions of single images, and access to the images."""

    samples: list[Sample]
    captions: dict[str, dict[str, str]]  # source -> digest of an image -> caption of this image alone
    source_of: dict[str, str]  # digest of an image -> source of this image
    files: ImageFiles

    @classmethod
    def read(cls, folder: Path, split: str, sources: Iterable[str], *, store: Path) -> Corpus:
        """Read the records of `sources` from the DiffCap shards in `folder`.

        The first call writes the corpus to the folder `store`; later calls, also on other ranks, only read `store`.
        Raises ValueError if a source has no record in the split, and OSError if the disk is full.
        """
        with waiting_lock(store.with_suffix(".lock")):
            if not store.exists():
                _write(store, (r for r in read_records(folder, f"{split}-*.parquet") if r.source in set(sources)))
        samples: list[Sample] = []
        captions: dict[str, dict[str, str]] = {}
        source_of: dict[str, str] = {}
        positions: dict[str, tuple[int, int]] = {}
        for _, row in json_lines(store / _RECORDS):
            sample = Sample(**row["sample"] | {"images": tuple(row["sample"]["images"]),
                                               "turns": tuple((q, a) for q, a in row["sample"]["turns"])})
            samples.append(sample)
            positions |= {name: (offset, size) for name, offset, size in row["new"]}
            source_of |= dict.fromkeys(sample.images, sample.source)
            captions.setdefault(sample.source, {}).update(row["captions"])
        for source in sorted(set(sources) - {sample.source for sample in samples}):
            raise ValueError(f"{folder}: source '{source}' has no pair in split '{split}'; generate or add pairs for "
                             "this source, or remove this source from the mixture in params.yaml")
        return cls(samples, captions, source_of, ImageFiles(store / _IMAGES, positions))


def _write(store: Path, records: Iterable[Record]) -> None:
    """Write the corpus to the folder `store`: one JSON line per record, and one file with all distinct images.

    The key `new` of a line lists (digest, offset, size) of each image that occurs in no earlier record.
    """
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
                            tuple(record.provenance.get("conversation", ())),
                            facts_of(record) if record.num_images == 2 else {})
            lines.write(json.dumps({
                "sample": asdict(sample), "new": new,
                "captions": {name: text for name, text in zip(names, captions, strict=True) if text}}) + "\n")
