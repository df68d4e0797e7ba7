"""Tests of the camera motions that Registration sees between photographs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor
from torch.testing import assert_close

from onediff.data.synthesis.edits.photographs import photo_paths
from onediff.model.registration import NUM_MOTIONS, QUARTERS, READ, SIDES, STEPS, Registration

PHOTOS = ("astronaut", "china", "coffee")


def photograph(name: str) -> Image.Image:
    """Return the middle square of a photograph that a Python package contains."""
    return ImageOps.fit(Image.open(photo_paths("train", None)[name]).convert("RGB"), (384, 384))


def scores(before: Image.Image, after: Image.Image) -> Tensor:
    """Return the correlations (2 directions, M) of a pair of images."""
    pixels = [torch.from_numpy(np.asarray(image.resize((96, 96)), np.float32) / 64 - 2) for image in (before, after)]
    return Registration().correlations(torch.stack(pixels).permute(0, 3, 1, 2)[None])[0]


def number_of(side: float, x: float, y: float) -> int:
    """Return the number of the motion that zooms into a window; `x` and `y` are two of STEPS."""
    return len(QUARTERS) + (SIDES.index(side) * len(STEPS) + STEPS.index(x)) * len(STEPS) + STEPS.index(y)


@pytest.mark.parametrize("name", PHOTOS)
@pytest.mark.parametrize("quarters", QUARTERS)
def test_a_turn_is_seen_in_both_directions(name: str, quarters: int) -> None:
    photo = photograph(name)
    there, back = scores(photo, photo.rotate(90 * quarters))  # counter-clockwise
    assert QUARTERS[int(there.argmax())] == quarters and there.max() > 0.95
    assert QUARTERS[int(back.argmax())] == -quarters % 4


@pytest.mark.parametrize("name", PHOTOS)
@pytest.mark.parametrize(("x", "y"), [(0.0, 0.5), (1.0, 0.5), (0.5, 0.0), (0.5, 1.0), (0.5, 0.5)])
def test_a_zoom_into_a_part_is_seen_and_the_way_back_in_the_other_direction(name: str, x: float, y: float) -> None:
    photo, side = photograph(name), round(0.58 * 384)
    left, top = round(x * (384 - side)), round(y * (384 - side))
    part = photo.crop((left, top, left + side, top + side))
    both = scores(photo, part)
    assert int(both.flatten().argmax()) == number_of(0.58, x, y)
    assert_close(scores(part, photo), both.flip(0))


def test_another_contrast_does_not_hide_a_turn() -> None:
    photo = photograph("coffee")
    there, _ = scores(photo, ImageEnhance.Contrast(photo.rotate(90)).enhance(0.4))
    assert QUARTERS[int(there.argmax())] == 1


def test_the_numbers_equal_a_loop_over_the_motions() -> None:
    torch.manual_seed(0)
    module, images = Registration(), torch.randn(5, 2, 3, 24, 24)
    motions = [(turn, 0.0, 0.0, 0.0) for turn in QUARTERS]
    motions += [(None, 1.0, 2 * x - 1, 2 * y - 1) for _ in SIDES for x in STEPS for y in STEPS]
    assert len(motions) == NUM_MOTIONS
    read, correlations = module(images), module.correlations(images)
    assert read.shape == (5, 2, READ)
    for pair in range(5):
        weights = (module.sharpness * correlations[pair].flatten()).softmax(0).unflatten(0, (2, NUM_MOTIONS))
        for direction in range(2):
            expected = [correlations[pair, direction, 0], correlations[pair, direction].max(), *[0.0] * 6]
            for weight, (turn, zoom, x, y) in zip(weights[direction], motions, strict=True):
                numbers = [*(float(turn == other) for other in QUARTERS), zoom, x, y]
                expected[2:] = [mean + weight * number for mean, number in zip(expected[2:], numbers, strict=True)]
            assert_close(read[pair, direction], torch.stack([torch.as_tensor(value) for value in expected]))


def test_flat_images_are_finite() -> None:
    flat = Registration()(torch.zeros(5, 2, 3, 24, 24))
    assert flat.isfinite().all()
    assert_close(flat[..., 2:6].sum((1, 2)), torch.ones(5))  # the probabilities of all motions
