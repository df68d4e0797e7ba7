from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from onediff.data.quality.shortcut import GRID, difference_features, pixel_difference_auc
from onediff.data.record import Record

P = 41


def pair(number: int, *, changed: bool, visible: bool) -> Record:
    """Return a pair of noise images; if the pair is changed and `visible`, the after image has a brighter square."""
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


def test_the_auc_is_near_1_if_pixels_show_the_change_and_near_one_half_if_they_do_not() -> None:
    visible = pixel_difference_auc(pairs(0, 90, visible=True), pairs(1000, 60, visible=True))
    invisible = pixel_difference_auc(pairs(0, 90, visible=False), pairs(1000, 60, visible=False))
    assert visible is not None
    assert visible > 0.99
    assert invisible is not None
    assert 0.3 < invisible < 0.7


def test_training_pairs_without_an_unchanged_pair_give_no_auc() -> None:
    changed = [pair(k, changed=True, visible=True) for k in range(5)]
    assert pixel_difference_auc(changed, pairs(9, 9, visible=True)) is None
