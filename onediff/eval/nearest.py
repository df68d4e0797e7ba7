"""The floor of memory: for each pair, which training pair looks most alike, by coarse pixels and no learning.

Shapes:  n pairs, m training pairs, E = 2 images x 8 x 8 places x 3 colors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from onediff.data.record import Record
from onediff.inputs.images import open_image

SIDE = 8
TRAIN_PAIRS = 10_000  # at most, drawn by seed: more would cost minutes and be the same floor

Row = Mapping[str, Any]


def look(before: Image.Image, after: Image.Image) -> NDArray[np.float32]:
    """(E,): the image before, and what differs after it, coarse; the difference counts as much as its contrast."""
    small = [np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float32) / 255
             for image in (before, after)]
    return np.concatenate([small[0].ravel(), (small[1] - small[0]).ravel()])


def nearest_rows(train: Sequence[Row], records: Callable[[str], Iterator[Record]], split: str,
                 *, seed: int = 0) -> dict[str, Row]:
    """pair_id of every record of `split` -> the row of `train` that looks most alike.

    `records` reads a split's records of the source or of the one whose training captions are used. Raises OSError for
    an image that cannot be read.
    """
    import faiss

    drawn = np.random.default_rng(seed).permutation(len(train))[:TRAIN_PAIRS]
    kept = {train[place]["pair_id"]: train[place] for place in sorted(drawn)}
    names, seen = _looks(record for record in records("train") if record.pair_id in kept)
    keys, asked = _looks(records(split))
    faiss.omp_set_num_threads(1)  # on a busy machine its threads wait for each other
    index = faiss.IndexFlatL2(seen.shape[1])
    index.add(seen)
    places = index.search(asked, 1)[1][:, 0]
    return {key: kept[names[place]] for key, place in zip(keys, places, strict=True)}


def _looks(records: Iterable[Record]) -> tuple[list[str], NDArray[np.float32]]:
    found = [(record.pair_id, look(open_image(record.before), open_image(record.after))) for record in records
             if record.num_images == 2]
    return [name for name, _ in found], np.stack([seen for _, seen in found])
