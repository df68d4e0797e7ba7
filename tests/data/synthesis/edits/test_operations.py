from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from onediff.data.synthesis.edits.operations import OPERATIONS, paste, rotate
from onediff.data.synthesis.edits.pictures import PLACES, Picture

Smooth = Callable[..., Picture]


def test_contrast_equals_a_pixel_by_pixel_reference(smooth: Smooth) -> None:
    start = smooth(size=(11, 7))
    strength, mean = np.random.default_rng(5).uniform(0.25, 0.6), smooth(size=(11, 7)).pixels.mean()
    after = OPERATIONS["less_contrast"](np.random.default_rng(5), start).after
    for (row, column, channel), value in np.ndenumerate(start.pixels):
        assert abs(after[row, column, channel] - (mean + (value - mean) * strength)) <= 0.51


@pytest.mark.parametrize(("operation", "sign"), [("brighten", 1), ("darken", -1)])
def test_a_brightness_operation_changes_no_pixel_in_the_other_direction(operation: str, sign: int) -> None:
    ramp = Picture("ramp", np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2))
    for seed in range(9):
        after = OPERATIONS[operation](np.random.default_rng(seed), ramp).after[0, :, 0].astype(int)
        assert (np.diff(after) >= 0).all()
        assert (sign * (after - np.arange(256)) >= 0).all()
        assert sign * (after[100] - 100) > 20


def test_a_rotation_to_the_left_is_counter_clockwise() -> None:
    marked = np.zeros((48, 96, 3), dtype=np.uint8)
    marked[:10] = 255  # a white stripe along the top border
    for seed in range(9):
        edit = rotate(np.random.default_rng(seed), Picture("marked", marked))
        border = edit.after[:, :10] if edit.new == "to the left" else edit.after[:, -10:]
        assert edit.after.shape == (96, 48, 3)
        assert (border == 255).all()


def test_a_crop_shows_the_part_at_the_position_in_the_caption() -> None:
    rows, columns = np.mgrid[0:71, 0:97]
    picture = Picture("position", np.stack([rows, columns, 0 * rows], axis=2).astype(np.uint8))
    seen = set()
    for seed in range(30):
        edit = OPERATIONS["crop"](np.random.default_rng(seed), picture)
        middle = edit.after[30:41, 43:54].mean(axis=(0, 1))
        u, v = 2 * middle[1] / 96 - 1, 1 - 2 * middle[0] / 70
        assert edit.new == min(PLACES, key=lambda name: np.hypot(u - PLACES[name][0], v - PLACES[name][1]))
        seen.add(edit.new)
    assert seen == set(PLACES)


@pytest.mark.parametrize("operation", ["paste", "remove"])
def test_the_edited_region_is_at_the_position_in_the_caption(operation: str, smooth: Smooth) -> None:
    seen = set()
    for seed in range(30):
        start = smooth(seed)
        edit = OPERATIONS[operation](np.random.default_rng(seed), start)
        assert edit.region is not None
        x0, y0, x1, y1 = edit.region
        u, v = (x0 + x1) / 97 - 1, 1 - (y0 + y1) / 71
        assert 0 <= x0 < x1 <= 97
        assert 0 <= y0 < y1 <= 71
        assert edit.new == min(PLACES, key=lambda name: np.hypot(u - PLACES[name][0], v - PLACES[name][1]))
        changed = (edit.after != start.pixels).any(axis=2)
        inside = changed[y0:y1, x0:x1]
        assert changed.sum() == inside.sum()
        assert 0.2 < inside.mean() < 0.95  # The changed part is smaller than the rectangle that contains it.
        seen.add(edit.new)
    assert seen == set(PLACES)


def test_a_pasted_object_is_complete() -> None:
    for seed in range(40):
        rng = np.random.default_rng(seed)
        edit = paste(rng, Picture("black", np.zeros((96, 96, 3), dtype=np.uint8)))
        x0, y0, x1, y1 = edit.region or (0, 0, 0, 0)
        window = edit.after[y0:y1, x0:x1].max(axis=2)
        border = np.concatenate([window[0], window[-1], window[:, 0], window[:, -1]])
        assert border.max() == 0, edit.thing
        assert (window > 0).mean() > 0.3
