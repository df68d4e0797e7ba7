"""Open-domain real pairs: images of a collection that are alike, but not the same."""

import functools
import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onediff.config import Retrieval, Runtime
from onediff.data.embedding import Embedder, Vectors
from onediff.data.parallel import spread
from onediff.data.record import Record, digest
from onediff.data.sources.collection import Entry, load
from onediff.files import new_file
from onediff.inputs.images import open_image
from onediff.inputs.prompt import DEFAULT_INSTRUCTION

PART = 512  # images whose vectors are stored together: what a kill can cost
EXACT_UP_TO = 200_000  # images; above, an inverted file searches PROBES of its sqrt(n) lists only
PROBES = 32


@dataclass(frozen=True)
class SimilarPair:
    """Two images by their place in the collection; the order of before and after is drawn by digest."""

    before: int
    after: int
    similarity: float


def find_pairs(vectors: Vectors, names: list[str], settings: Retrieval) -> list[SimilarPair]:
    """Neighbours inside the window, nearest first, each image in at most max_uses pairs and no pair twice.

    `vectors` (n, d) have length 1. The same vectors and names give the same pairs in the same order.
    """
    similarity, neighbour = _nearest(vectors, settings.num_neighbors + 1)
    rows, columns = np.nonzero((similarity >= settings.min_similarity) & (similarity <= settings.max_similarity))
    candidates: dict[tuple[int, int], float] = {}
    for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
        other = int(neighbour[row, column])
        if other not in (-1, row):
            candidates.setdefault((min(row, other), max(row, other)), round(float(similarity[row, column]), 6))
    uses: Counter[int] = Counter()
    pairs = []
    for places, value in sorted(candidates.items(), key=lambda item: (-item[1], item[0])):
        if max(uses[place] for place in places) < settings.max_uses:
            uses.update(places)
            swap = int(digest("|".join(names[place] for place in places).encode()), 16) % 2
            pairs.append(SimilarPair(*(places[::-1] if swap else places), value))
    return pairs


def pair_records(source: str, entries: list[Entry], pairs: list[SimilarPair]) -> Iterator[Record]:
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
    unreadable: dict[str, str]


def embed_collection(entries: list[Entry], model: str, runtime: Runtime, *,
                     max_megapixels: float) -> Iterator[Embedded]:
    """PART images at a time, in order. Stored in scratch by content, so that a stopped run costs one part."""
    parts = [entries[start : start + PART] for start in range(0, len(entries), PART)]
    make = functools.partial(_PartEmbedder, model, runtime.device, Path(runtime.scratch) / "embeddings", max_megapixels)
    return spread(make, parts, runtime, num_gpus=1)


class _PartEmbedder:
    """Loads the model once in each process."""

    def __init__(self, model: str, device: str, folder: Path, max_megapixels: float) -> None:
        self.embedder, self.folder, self.max_megapixels = Embedder(model, device), folder, max_megapixels
        self.model_key = hashlib.sha256(self.embedder.identity.encode())

    def __call__(self, part: list[Entry]) -> Embedded:
        images, names, unreadable = [], [], {}
        key = self.model_key.copy()
        for item in load(part):
            try:
                images.append(open_image(item.content, max_megapixels=self.max_megapixels))
                names.append(item.name)
                key.update(hashlib.sha256(item.content).digest())
            except ValueError as error:
                unreadable[item.name] = str(error)
        if not images:
            return Embedded(np.zeros((0, 0), np.float32), [], unreadable)
        path = self.folder / f"{key.hexdigest()[:32]}.npy"
        if not path.exists():
            with new_file(path) as temporary, temporary.open("wb") as file:
                np.save(file, self.embedder.images(images))
        return Embedded(np.load(path), names, unreadable)
