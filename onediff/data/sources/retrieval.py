"""Finds open-domain real pairs: two images of a collection that are similar but not duplicates."""

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

PART = 512  # number of images whose embeddings are stored together in one file
EXACT_UP_TO = 200_000  # largest number of images for exact search; with more images, the search is approximate
PROBES = 32  # number of index lists that the approximate search visits for each image


@dataclass(frozen=True)
class SimilarPair:
    """The positions of two similar images in the collection, and their cosine similarity.

    A digest of the two image names decides which image is `before`.
    """

    before: int
    after: int
    similarity: float


def find_pairs(vectors: Vectors, names: list[str], settings: Retrieval) -> list[SimilarPair]:
    """Return the pairs of images that are similar but not too similar, most similar first.

    The cosine similarity of a pair is between `min_similarity` and `max_similarity` of `settings`. Each image is in at
    most `max_uses` pairs, and no pair occurs twice. `vectors` (n images, d dimensions) must have length 1. Equal
    arguments give equal pairs in equal order.
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
    """Yield a training record for each pair of images. It has no references, because the writer adds them later."""
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
    """Return the cosines and the positions of the `count` nearest vectors of each vector, the nearest first.

    Both arrays have the shape (n vectors, count). A position is -1 if the search found fewer than `count` vectors.
    """
    import faiss

    faiss.omp_set_num_threads(1)  # Use one thread, because sums over several threads round differently.
    rows = np.ascontiguousarray(vectors, dtype=np.float32)
    index: faiss.Index = faiss.IndexFlatIP(rows.shape[1])
    if len(rows) > EXACT_UP_TO:
        lists = int(len(rows) ** 0.5)  # number of lists into which the index divides the images
        inverted = faiss.IndexIVFFlat(index, rows.shape[1], lists, faiss.METRIC_INNER_PRODUCT)
        inverted.train(rows)
        inverted.nprobe = min(PROBES, lists)
        index = inverted
    index.add(rows)
    similarity, neighbour = index.search(rows, min(count, len(rows)))
    return similarity, neighbour



@dataclass(frozen=True)
class Embedded:
    """The embeddings and names of all readable images in order, and the error message of each unreadable image."""

    vectors: Vectors
    names: list[str]
    unreadable: dict[str, str]


def embed_collection(entries: list[Entry], model: str, runtime: Runtime, *,
                     max_megapixels: float) -> Iterator[Embedded]:
    """Yield the embeddings of the images in a collection in order, PART images at a time.

    The embeddings of each part are stored in the scratch folder under a digest of the model and the images, so the next
    run after an interruption does not compute the finished parts again.
    """
    parts = [entries[start : start + PART] for start in range(0, len(entries), PART)]
    make = functools.partial(_PartEmbedder, model, runtime.device, Path(runtime.scratch) / "embeddings", max_megapixels)
    return spread(make, parts, runtime, num_gpus=1)


class _PartEmbedder:
    """A worker that embeds parts of an image collection; each process loads the model once."""

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
