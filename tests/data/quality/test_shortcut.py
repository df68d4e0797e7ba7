from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from onediff.data.quality.shortcut import GRID, difference_features, pixel_difference_auc
from onediff.data.record import Record

P = 41


def pair(number: int, *, changed: bool, visible: bool) -> Record:
    rng = np.random.default_rng(number)
    before = rng.integers(100, 120, (P, P, 3)).astype(np.uint8)
    after = rng.integers(100, 120, (P, P, 3)).astype(np.uint8)
    if changed and visible:
        after[10:20, 10:20] += 60
    return Record(f"p{number}", "scenes", "train", f"g{number}", png(before), png(after), ["a"], "?",
                  "add" if changed else "none", {})


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def pairs(first: int, count: int, *, visible: bool) -> list[Record]:
    return [pair(first + k, changed=k % 3 > 0, visible=visible) for k in range(count)]


def test_features_equal_a_cell_by_cell_reference() -> None:
    record = pair(1, changed=True, visible=True)
    before, after = (
        np.asarray(Image.open(io.BytesIO(content))).astype(float) for content in (record.before, record.after)
    )
    features, delta = difference_features(record), np.abs(after - before)
    edges = np.cumsum([0, *(len(part) for part in np.array_split(np.arange(P), GRID))])
    for row in range(GRID):
        for column in range(GRID):
            cell = delta[edges[row]:edges[row + 1], edges[column]:edges[column + 1]]
            start = 3 * (GRID * row + column)
            assert features[start:start + 3] == pytest.approx(cell.mean(axis=(0, 1)))
    assert features[3 * GRID * GRID:3 * GRID * GRID + 3] == pytest.approx([delta.mean(), delta.max(), delta.std()])


def test_a_change_that_pixels_show_is_found_and_noise_is_not() -> None:
    shown = pixel_difference_auc(pairs(0, 90, visible=True), pairs(1000, 60, visible=True))
    hidden = pixel_difference_auc(pairs(0, 90, visible=False), pairs(1000, 60, visible=False))
    assert shown is not None
    assert shown > 0.99
    assert hidden is not None
    assert 0.3 < hidden < 0.7


def test_without_unchanged_pairs_there_is_no_figure() -> None:
    assert (
        pixel_difference_auc([pair(k, changed=True, visible=True) for k in range(5)], pairs(9, 9, visible=True)) is None
    )
