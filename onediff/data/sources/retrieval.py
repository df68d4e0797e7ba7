"""Open-domain real pairs: images of a collection that are alike, but not the same."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onediff.config import Retrieval, Runtime
from onediff.data.embedding import Embedder, Vectors
from onediff.data.parallel import spread
from onediff.data.record import Record, digest
from onediff.data.sources.collection import Entry, load
from onediff.inputs.images import open_image
from onediff.inputs.prompt import DEFAULT_INSTRUCTION

PART = 512  # images whose vectors are kept together: what a kill can cost
EXACT_UP_TO = 200_000  # images; above, an inverted file looks through PROBES of its sqrt(n) lists only
PROBES = 32


@dataclass(frozen=True)
class Match:
    """Two images by their place in the collection; the order of before and after is drawn by digest."""

    before: int
    after: int
    similarity: float


def find_pairs(vectors: Vectors, names: list[str], settings: Retrieval) -> list[Match]:
    """Neighbours inside the window, nearest first, each image in at most max_uses pairs and no pair twice.

    `vectors` (n, d) have length 1. The same vectors and names give the same pairs in the same order.
    """
    similarity, neighbour = _nearest(vectors, settings.num_neighbors + 1)
    rows, columns = np.nonzero((similarity >= settings.min_similarity) & (similarity <= settings.max_similarity))
    found: dict[tuple[int, int], float] = {}
    for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
        other = int(neighbour[row, column])
        if other not in (-1, row):
            found.setdefault((min(row, other), max(row, other)), round(float(similarity[row, column]), 6))
    uses: Counter[int] = Counter()
    pairs = []
    for (one, other), value in sorted(found.items(), key=lambda item: (-item[1], item[0])):
        if max(uses[one], uses[other]) < settings.max_uses:
            uses.update((one, other))
            swap = int(digest(f"{names[one]}|{names[other]}".encode()), 16) % 2
            pairs.append(Match(*((other, one) if swap else (one, other)), value))
    return pairs


def pair_records(source: str, entries: list[Entry], pairs: list[Match]) -> Iterator[Record]:
    """A training record of each pair, without references: those are the writer's to give."""
    for pair in pairs:
        before, after = (next(load([entries[place]])) for place in (pair.before, pair.after))
        key = digest(f"{before.name}|{after.name}".encode())[:16]
        yield Record(
            pair_id=f"{source}-train-{key}", source=source, split="train", group_id=f"{source}-{key}",
            before=before.content, after=after.content, references=[], instruction=DEFAULT_INSTRUCTION,
            change_type="unlabelled",
            provenance={"official_id": key, "official_split": "train", "names": [before.name, after.name],
                        "captions": [before.caption, after.caption], "similarity": pair.similarity})


def _nearest(vectors: Vectors, count: int) -> tuple[Vectors, np.ndarray]:
    """(n, count) cosines and places, nearest first; -1 where there is no more."""
    import faiss

    faiss.omp_set_num_threads(1)  # sums that are split over threads round differently
    rows = np.ascontiguousarray(vectors, dtype=np.float32)
    index: faiss.Index = faiss.IndexFlatIP(rows.shape[1])
    if len(rows) > EXACT_UP_TO:
        lists = int(len(rows) ** 0.5)
        inverted = faiss.IndexIVFFlat(index, rows.shape[1], lists, faiss.METRIC_INNER_PRODUCT)
        inverted.train(rows)
        inverted.nprobe = min(PROBES, lists)
        index = inverted
    index.add(rows)
    similarity, neighbour = index.search(rows, min(count, len(rows)))
    return similarity, neighbour


# --- vectors ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Embedded:
    """Vectors of the images that can be read, in order, and why the others cannot."""

    vectors: Vectors
    names: list[str]
    broken: dict[str, str]


def embed_collection(entries: list[Entry], model: str, runtime: Runtime, *,
                     max_megapixels: float) -> Iterator[Embedded]:
    """PART images at a time, in order. Kept in scratch by content, so that a stopped run costs one part."""
    parts = [entries[start : start + PART] for start in range(0, len(entries), PART)]
    folder = Path(runtime.scratch) / "embeddings"
    return spread(_Maker(model, runtime.device, folder, max_megapixels), parts, runtime, num_gpus=1)


@dataclass(frozen=True)
class _Maker:
    model: str
    device: str
    folder: Path
    max_megapixels: float

    def __call__(self) -> Callable[[list[Entry]], Embedded]:
        embedder = Embedder(self.model, self.device)
        known = embedder.identity
        return lambda part: self._embed(embedder, known, part)

    def _embed(self, embedder: Embedder, known: str, part: list[Entry]) -> Embedded:
        images, names, broken = [], [], {}
        key = hashlib.sha256(known.encode())
        for item in load(part):
            try:
                images.append(open_image(item.content, max_megapixels=self.max_megapixels))
                names.append(item.name)
                key.update(hashlib.sha256(item.content).digest())
            except ValueError as error:
                broken[item.name] = str(error)
        if not images:
            return Embedded(np.zeros((0, 0), np.float32), [], broken)
        path = self.folder / f"{key.hexdigest()[:32]}.npy"
        if not path.exists():
            _write(path, embedder.images(images))
        return Embedded(np.load(path), names, broken)


def _write(path: Path, vectors: Vectors) -> None:
    """Appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_suffix(f".{os.getpid()}.part")
    with half.open("wb") as file:
        np.save(file, vectors)
    half.rename(path)
