from __future__ import annotations

import numpy as np
import pytest

from onediff.inputs.boxes import coverage, on_the_grid


def test_coverage_equals_the_share_of_fine_points_inside_the_box() -> None:
    fine = (np.arange(80) + 0.5) / 20  # positions of 20 points along each of 4 patches
    for box in ([0.2, 1.1, 2.7, 3.95], [1, 1, 2, 2], [0, 0, 4, 4], [3.05, 0.4, 3.35, 0.6]):
        inside = ((fine >= box[1]) & (fine < box[3]))[:, None] & ((fine >= box[0]) & (fine < box[2]))[None, :]
        counted = inside.reshape(4, 20, 4, 20).mean((1, 3))
        assert np.allclose(coverage(box, side=4), counted, atol=0.05), box
        assert coverage(box, side=4).sum() == pytest.approx((box[2] - box[0]) * (box[3] - box[1]))


def test_a_box_of_a_wide_image_is_moved_into_the_padded_square() -> None:
    assert on_the_grid([0, 0, 50, 40], (100, 40), side=10) == (0, 3, 5, 7)
