from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest

from onediff.data.synthesis.render import COLORS, SHAPES, render
from onediff.data.synthesis.scenes.drawing import draw_things, draw_view
from onediff.train.pretrain import examples
from onediff.train.pretrain.examples import (
    ATTRIBUTES,
    IMAGE_PX,
    PATCH_PX,
    SIDE,
    UNKNOWN,
    make_example,
    make_plain_example,
    patch_labels,
    photometry,
)


def test_the_labels_of_each_patch_equal_labels_computed_by_counting_pixels() -> None:
    rng = np.random.default_rng(4)
    things = draw_things(rng, 4)
    assert things
    _, ids = render(things, draw_view(rng, 1.0), IMAGE_PX)
    attributes, present, offsets = patch_labels(ids, things)
    for n in range(SIDE * SIDE):
        row, column = divmod(n, SIDE)
        patch = ids[row * PATCH_PX : (row + 1) * PATCH_PX, column * PATCH_PX : (column + 1) * PATCH_PX]
        counts = [int((patch == k).sum()) for k in range(len(things))]
        best = int(np.argmax(counts))
        is_present = counts[best] > 0.12 * PATCH_PX**2
        assert present[n] == is_present
        if not is_present:
            assert (attributes[n] == UNKNOWN).all()
            continue
        assert SHAPES[attributes[n, 0]] == things[best].shape
        assert tuple(COLORS)[attributes[n, 1]] == things[best].color
        rows, columns = np.nonzero(ids == best)
        offset = [columns.mean() / PATCH_PX - column - 0.5, rows.mean() / PATCH_PX - row - 0.5]
        assert np.allclose(offsets[n], offset, atol=1e-2)  # half precision
    assert present.sum() > 4


def test_the_same_seed_gives_the_same_example() -> None:
    for seed in (0, 5, 11):
        first, second = make_example(seed), make_example(seed)
        for field in fields(first):
            assert np.array_equal(getattr(first, field.name), getattr(second, field.name), equal_nan=field.name
                                  == "offsets")


def test_photometry_measures_brightness_contrast_and_sharpness() -> None:
    images = np.zeros((2, IMAGE_PX, IMAGE_PX, 3), np.uint8)
    images[0] = 51
    images[1, :, ::2] = 255
    flat, striped = (photometry(image)[10] for image in images)
    assert np.allclose(flat[:3], 0.2)
    assert striped[3] > flat[3] + 1
    assert striped[4] > flat[4] + 1


@pytest.mark.parametrize("edit", examples.EDITS)
def test_an_edit_keeps_only_the_labels_that_stay_true(edit: examples.Edit) -> None:
    rng = np.random.default_rng(3)
    canvas = examples.table_top(rng)
    ids, caption = canvas.ids, canvas.caption
    edit(rng, canvas)
    assert canvas.image.shape == (IMAGE_PX, IMAGE_PX, 3) and canvas.image.dtype == np.uint8
    moved = edit in (examples.turn, examples.zoom)
    assert np.array_equal(canvas.ids, ids) != moved
    assert canvas.colors_known == (edit is not examples.change_colors)
    assert canvas.caption == ("" if moved or not canvas.colors_known else caption)


def test_a_turned_table_top_has_the_labels_of_the_turned_objects() -> None:
    canvas = examples.table_top(np.random.default_rng(3))
    before = patch_labels(canvas.ids, canvas.things)[0].reshape(SIDE, SIDE, 4)
    canvas.ids = np.rot90(canvas.ids)
    assert np.array_equal(patch_labels(canvas.ids, canvas.things)[0].reshape(SIDE, SIDE, 4), np.rot90(before))


def test_a_new_ground_leaves_the_objects_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examples, "TEXTURED_GROUND", 1.0)
    canvas = examples.table_top(np.random.default_rng(3))
    image = canvas.image
    examples.change_ground(np.random.default_rng(5), canvas)
    objects = canvas.ids >= 0
    assert np.array_equal(canvas.image[objects], image[objects])
    assert (canvas.image[~objects] != image[~objects]).any(axis=1).mean() > 0.5


def test_a_plain_example_has_an_object_with_all_attributes_known() -> None:
    example = make_plain_example(7)
    assert example.present.any() and example.caption
    assert (example.attributes[example.present == 1] != UNKNOWN).all()
    assert example.attributes.shape == (SIDE * SIDE, len(ATTRIBUTES))
