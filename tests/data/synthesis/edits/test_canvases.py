from __future__ import annotations

import numpy as np

from onediff.data.synthesis.edits.canvases import draw_canvas, render_canvas
from onediff.data.synthesis.edits.pictures import PLACES
from onediff.data.synthesis.render import bounding_box


def test_the_first_object_of_a_canvas_is_at_the_named_position() -> None:
    for seed in range(20):
        canvas = draw_canvas(np.random.default_rng(seed), [(96, 96), (96, 60), (60, 96)][seed % 3])
        assert canvas.view is not None and canvas.ground is not None
        _, ids = render_canvas(list(canvas.things[:1]), canvas.view, canvas.ground)
        left, top, right, bottom = bounding_box(ids == 0) or (0, 0, 0, 0)
        width, height = canvas.size
        u, v = (left + right) / width - 1, 1 - (top + bottom) / height
        assert canvas.place == min(PLACES, key=lambda name: np.hypot(u - PLACES[name][0], v - PLACES[name][1]))


def test_the_ground_of_a_canvas_changes_only_pixels_of_the_table() -> None:
    canvas = draw_canvas(np.random.default_rng(4), (96, 72))
    assert canvas.view is not None and canvas.ground is not None
    plain, ids = render_canvas(list(canvas.things), canvas.view, np.ones((72, 96, 3)))
    colored, _ = render_canvas(list(canvas.things), canvas.view, np.full((72, 96, 3), 0.5))
    assert np.array_equal(plain[ids >= 0], colored[ids >= 0])
    assert (colored[ids < 0] < plain[ids < 0]).all()
