"""Tests of the motion of content and camera, with random features that are different in each place.

Shapes:  P pairs, G places per side, Q = G * G places, C channels.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

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
