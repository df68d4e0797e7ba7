"""Tests of the motion of content, with random features that are different in each place.

Shapes:  P pairs, G places per side, Q = G * G places, C channels.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from onediff.model.motion import FLOW, Motion

P, G, C = 3, 7, 61


def grids() -> Tensor:
    """Return features (P, G rows, G columns, C) that are normalized over the channels."""
    features = torch.randn(P, G, G, C, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.layer_norm(features, (C,))


def flow_between(before: Tensor, after: Tensor) -> Tensor:
    """Return the flow (P, G, G, 2 * FLOW) between two grids of features."""
    return Motion(G)(before.flatten(1, 2), after.flatten(1, 2)).unflatten(1, (G, G))


def test_equal_images_rest() -> None:
    flow = flow_between(grids(), grids())
    assert flow[..., :2].abs().max() < 0.05 and flow[..., 2].min() > 0.9


def test_a_shift_is_recovered_in_both_directions() -> None:
    after = grids().roll(2, dims=2)  # two places to the right
    after[:, :, :2] = torch.nn.functional.layer_norm(torch.randn(P, G, 2, C), (C,))  # new content enters on the left
    flow, shift = flow_between(grids(), after), torch.tensor([2 * 2 / G, 0])  # positions run from -1 to 1
    stays, came = flow[:, :, : G - 2, :2], flow[:, :, 2:, FLOW : FLOW + 2]  # The last two columns left the image.
    assert_close(stays, shift.expand_as(stays), atol=0.05, rtol=0)
    assert_close(came, -shift.expand_as(came), atol=0.05, rtol=0)


@pytest.mark.parametrize("quarters", [1, -1])  # counter-clockwise, clockwise
def test_a_turn_by_90_degrees_is_recovered(quarters: int) -> None:
    flow = flow_between(grids(), grids().rot90(quarters, dims=(1, 2)))
    x, y = Motion(G).positions.unflatten(0, (G, G)).unbind(-1)
    turned = torch.stack([quarters * y, -quarters * x], -1)
    assert_close(flow[..., :2], (turned - torch.stack([x, y], -1)).expand(P, -1, -1, -1), atol=0.05, rtol=0)


def test_only_a_moved_object_has_a_flow() -> None:
    before, after = grids(), grids()
    after[:, 1, 1], after[:, 5, 4] = before[:, 5, 4], before[:, 1, 1]
    length = flow_between(before, after)[..., :2].norm(dim=-1)  # (P, G, G)
    is_moved = torch.zeros(G, G, dtype=torch.bool)
    is_moved[1, 1] = is_moved[5, 4] = True
    assert length[:, is_moved].min() > 1 and length[:, ~is_moved].max() < 0.1


def test_swapping_the_images_swaps_both_directions() -> None:
    before, after = grids(), grids().roll(1, dims=1)
    assert_close(flow_between(after, before), flow_between(before, after).roll(FLOW, -1))


def test_images_without_any_detail_give_finite_gradients() -> None:
    features = torch.zeros(P, G * G, C, requires_grad=True)
    Motion(G)(features, features).sum().backward()
    assert features.grad is not None and features.grad.isfinite().all()
