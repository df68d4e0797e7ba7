"""Open-domain real pairs: images of a collection that are alike, but not the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from onediff.config import Retrieval
from onediff.data.collection import Entry, load
from onediff.data.embedding import Vectors
from onediff.data.record import Record, digest
from onediff.inputs.prompt import DEFAULT_INSTRUCTION

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
