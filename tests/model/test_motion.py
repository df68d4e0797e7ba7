"""Tests of the motion of content and camera, with random features that are different in each place.

Shapes:  P pairs, G places per side, Q = G * G places, C channels.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.testing import assert_close

from onediff.data.synthesis.edits.photographs import photo_paths
from onediff.model.motion import CAMERA, FLOW, Motion, fit_camera, positions_after

P, G, C = 3, 7, 61
REST = [0.0, 0.0, 0.0, 0.0]


def grids(side: int = G) -> Tensor:
    """Return features (P, G rows, G columns, C) that are normalized over the channels."""
    features = torch.randn(P, side, side, C, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.layer_norm(features, (C,))


def motion_between(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """Return the flow (P, G, G, 2 * FLOW) and the camera motions (P, 2 * CAMERA) of two grids of features."""
    flow, camera = Motion(before.shape[1])(before.flatten(1, 2), after.flatten(1, 2))
    return flow.unflatten(1, before.shape[1:3]), camera


def photograph(name: str) -> Image.Image:
    """Return the middle square of a photograph that a Python package contains."""
    return ImageOps.fit(Image.open(photo_paths("train", None)[name]).convert("RGB"), (384, 384))


def camera_between(before: Image.Image, after: Image.Image) -> Tensor:
    """Return the camera motions (2 * CAMERA,) that are seen in the colors of 12 x 12 places of two images.

    The mean and the spread of the colors in a place are mapped to random waves, so that places of similar color have
    similar features. The mean and the spread do not depend on the direction of a pattern.
    """
    generator = torch.Generator().manual_seed(1)
    waves, phases = 2 * torch.randn(6, C, generator=generator), 2 * torch.pi * torch.rand(C, generator=generator)
    features = []
    for image in (before, after):
        pixels = torch.from_numpy(np.asarray(image.resize((96, 96), Image.Resampling.BOX)) / 64.0).float()
        tiles = pixels.unfold(0, 8, 8).unfold(1, 8, 8).flatten(-2)  # (12, 12, 3 colors, 64 pixels)
        colors = torch.cat([tiles.mean(-1), 2 * tiles.std(-1)], -1)
        features.append(torch.nn.functional.layer_norm((colors @ waves + phases).cos(), (C,)).flatten(0, 1)[None])
    return Motion(12)(*features)[1][0]


@pytest.mark.parametrize("name", ["astronaut", "china", "coffee"])
def test_the_camera_motion_between_photographs_has_the_known_sign_and_size(name: str) -> None:
    photo = photograph(name)
    turned = camera_between(photo, photo.rotate(90))  # counter-clockwise
    assert_close(turned, torch.tensor([-1.0, -1, 0, 0, -1, 1, 0, 0]), atol=0.1, rtol=0)
    shifted = camera_between(photo.crop((48, 0, 384, 336)), photo.crop((0, 0, 336, 336)))  # content moves to the right
    shift = 48 / 336 * 2
    assert_close(shifted, torch.tensor([0, 0, shift, 0, 0, 0, -shift, 0]), atol=0.2, rtol=0)
    assert shifted[2] > 0.2 and shifted[CAMERA + 2] < -0.2


@pytest.mark.parametrize("name", ["astronaut", "china", "coffee"])
def test_the_motion_from_a_part_of_a_photograph_to_all_of_it_has_the_known_growth_and_shift(name: str) -> None:
    """In the other direction most places have no match, so the growth that is seen there is too small."""
    photo = photograph(name)
    middle, corner = photo.crop((77, 77, 307, 307)), photo.crop((0, 0, 269, 269))
    cropped, zoomed_out = camera_between(photo, middle)[CAMERA:], camera_between(middle, photo)[:CAMERA]
    assert_close(zoomed_out, cropped)
    assert_close(zoomed_out, torch.tensor([230 / 384 - 1, 0, 0, 0]), atol=0.1, rtol=0)
    expected = torch.tensor([269 / 384 - 1, 0, 269 / 384 - 1, 269 / 384 - 1])  # the upper left part
    assert_close(camera_between(photo, corner)[CAMERA:], expected, atol=0.13, rtol=0)


def test_equal_images_rest() -> None:
    flow, camera = motion_between(grids(), grids())
    assert_close(camera, torch.tensor(2 * REST).expand(P, -1), atol=0.02, rtol=0)
    assert flow[..., :4].abs().max() < 0.05 and flow[..., 4].min() > 0.9


def test_a_shift_is_recovered_in_both_directions() -> None:
    after = grids().roll(2, dims=2)  # two places to the right
    after[:, :, :2] = torch.nn.functional.layer_norm(torch.randn(P, G, 2, C), (C,))  # new content enters on the left
    flow, camera = motion_between(grids(), after)
    shift = 2 * 2 / G  # positions run from -1 to 1
    assert_close(camera[:, :CAMERA], torch.tensor([0, 0, shift, 0]).expand(P, -1), atol=0.03, rtol=0)
    assert_close(camera[:, CAMERA:], torch.tensor([0, 0, -shift, 0]).expand(P, -1), atol=0.03, rtol=0)
    stays = flow[:, :, : G - 2]  # The last two columns left the image.
    assert_close(stays[..., :2], torch.tensor([shift, 0]).expand_as(stays[..., :2]), atol=0.05, rtol=0)


@pytest.mark.parametrize(("quarters", "sine"), [(1, -1.0), (-1, 1.0)])  # counter-clockwise, clockwise
def test_a_turn_by_90_degrees_is_recovered(quarters: int, sine: float) -> None:
    _, camera = motion_between(grids(), grids().rot90(quarters, dims=(1, 2)))
    assert_close(camera[:, :CAMERA], torch.tensor([-1.0, sine, 0, 0]).expand(P, -1), atol=0.03, rtol=0)
    assert_close(camera[:, CAMERA:], torch.tensor([-1.0, -sine, 0, 0]).expand(P, -1), atol=0.03, rtol=0)


def test_an_enlarged_part_has_the_growth_and_the_shift_of_the_crop() -> None:
    before = grids(side=8)
    after = before[:, 2:6, :4].repeat_interleave(2, 1).repeat_interleave(2, 2)  # the middle of the left half
    _, camera = motion_between(before, after)
    # The middle of the crop, x = -0.5, moves to 0, and all distances double: z -> 2 * z + 1.
    assert_close(camera[:, :CAMERA], torch.tensor([1.0, 0, 1.0, 0]).expand(P, -1), atol=0.15, rtol=0)
    assert_close(camera[:, CAMERA:], torch.tensor([-0.5, 0, -0.5, 0]).expand(P, -1), atol=0.05, rtol=0)


def test_a_moved_object_does_not_move_the_camera_and_is_what_the_camera_does_not_explain() -> None:
    before, after = grids(), grids()
    after[:, 1, 1], after[:, 5, 4] = before[:, 5, 4], before[:, 1, 1]
    flow, camera = motion_between(before, after)
    assert_close(camera, torch.tensor(2 * REST).expand(P, -1), atol=0.05, rtol=0)
    unexplained = flow[..., 2:4].norm(dim=-1)  # (P, G, G)
    is_moved = torch.zeros(G, G, dtype=torch.bool)
    is_moved[1, 1] = is_moved[5, 4] = True
    assert unexplained[:, is_moved].min() > 1 and unexplained[:, ~is_moved].max() < 0.1


def test_the_fit_equals_the_motion_that_made_the_positions() -> None:
    start, camera = torch.rand(11, 2) * 2 - 1, torch.tensor([[0.3, -0.2, 0.5, 0.1], [-0.4, 0.7, 0, -0.3]])
    fitted = fit_camera(start, positions_after(camera, start), torch.rand(2, 11) + 0.1)
    assert_close(fitted, camera, atol=2e-3, rtol=0)


def test_a_camera_motion_equals_the_product_with_a_complex_number() -> None:
    camera, positions = torch.tensor([[0.3, -0.2, 0.5, 0.1]]), torch.tensor([[0.5, -0.25]])
    moved = (1.3 - 0.2j) * (0.5 - 0.25j) + 0.5 + 0.1j
    assert_close(positions_after(camera, positions)[0, 0], torch.tensor([moved.real, moved.imag]))


def test_swapping_the_images_swaps_both_directions() -> None:
    before, after = grids(), grids().roll(1, dims=1)
    (flow, camera), (swapped_flow, swapped_camera) = motion_between(before, after), motion_between(after, before)
    assert_close(swapped_camera, camera.roll(CAMERA, -1))
    assert_close(swapped_flow, flow.roll(FLOW, -1))


def test_images_without_any_detail_give_finite_gradients() -> None:
    features = torch.zeros(P, G * G, C, requires_grad=True)
    flow, camera = Motion(G)(features, features)
    (flow.sum() + camera.sum()).backward()
    assert features.grad is not None and features.grad.isfinite().all()
