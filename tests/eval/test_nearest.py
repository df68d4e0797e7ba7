from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
from PIL import Image

from onediff.data.record import Record
from onediff.eval.nearest import look, nearest_rows


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def record(split: str, number: int, *, noise: int = 0) -> Record:
    rng = np.random.default_rng(number)
    before, after = (rng.integers(0, 200, (40, 40, 3), dtype=np.uint8) for _ in range(2))
    before, after = (side + np.random.default_rng(noise).integers(0, noise + 1, side.shape, dtype=np.uint8)
                     for side in (before, after))
    name = f"{split}-{number}"
    return Record(name, "street", split, str(number), png(before), png(after), [str(number)], "", "x", {})


def test_each_pair_finds_its_noisy_copy() -> None:
    train, test = [record("train", k) for k in range(11)], [record("test", k, noise=40) for k in (7, 2, 5)]
    rows = [{"pair_id": item.pair_id, "references": item.references} for item in train]

    def records(split: str) -> Iterator[Record]:
        return iter(train if split == "train" else test)

    found = nearest_rows(rows, records, "test")
    assert {key: row["pair_id"] for key, row in found.items()} == {f"test-{k}": f"train-{k}" for k in (7, 2, 5)}


def test_the_difference_counts_and_not_the_image_alone() -> None:
    same, other = Image.new("RGB", (40, 40), "gray"), Image.new("RGB", (40, 40), "white")
    unchanged, changed, undone = look(same, same), look(same, other), look(other, same)
    assert np.linalg.norm(changed - unchanged) > 1 and np.linalg.norm(changed - undone) > 1
