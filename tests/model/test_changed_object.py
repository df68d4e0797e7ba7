from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from onediff.inputs.processing import IGNORED
from onediff.model.changed_object import (
    SQUARES,
    AttributeTokens,
    ChangedObject,
    changed_loss,
    object_loss,
    place_loss,
)
from onediff.model.registration import READ

P, SIDE, Q, E, W, D = 3, 6, 36, 7, 11, 13
CLASSES = {"color": {"red": [2], "green": [3, 5], "blue": [7]}, "shape": {"cube": [11], "sphere": [13, 17, 19]}}


def inputs() -> list[Tensor]:
    """Return features, joined map, place logits and scores of the camera motions for P pairs."""
    generator = torch.Generator().manual_seed(3)
    shapes = (P, 2, E), (P, Q, W), (P, 2, Q), (P, 2 * READ)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def test_the_object_is_read_where_the_place_logits_point() -> None:
    torch.manual_seed(0)
    module, (features, joined, places, camera) = ChangedObject(E, W, D, side=SIDE, classes=CLASSES), inputs()
    tokens, changed, logits = module(features, joined, places, camera)
    for pair in range(P):
        summary = torch.cat([joined[pair].mean(0), joined[pair].max(0).values])
        seen = []
        for side in range(2):
            share, squares = places[pair, side].softmax(0), torch.zeros(SQUARES, SQUARES)
            middle = torch.zeros(2)
            for place in range(Q):
                row, column = divmod(place, SIDE)
                squares[row * SQUARES // SIDE, column * SQUARES // SIDE] += share[place]
                middle += share[place] * torch.tensor([(2 * number + 1) / SIDE - 1 for number in (column, row)])
            mean = sum(share[place] * joined[pair, place] for place in range(Q))
            seen += [features[pair, side], mean, squares.flatten(), middle, places[pair, side].max()[None]]
        probability = module.changed(summary).sigmoid()
        everything = torch.cat([*seen, summary, probability, camera[pair]])
        assert_close(tokens[pair, 0], module.describe(everything) + module.marks[0])
        assert_close(tokens[pair, 1], module.camera(camera[pair]) + module.marks[1])
        for number, attribute in enumerate(module.attributes):
            assert_close(logits[number][pair], attribute(everything))
        assert_close(changed[pair].sigmoid()[None], probability)


def test_an_attribute_token_is_the_mean_of_the_words_weighted_by_probability() -> None:
    tokens, embedding = AttributeTokens(CLASSES, D), torch.nn.Embedding(23, D)
    torch.nn.init.normal_(tokens.marks)
    logits = [torch.randn(P, 4), torch.tensor([[50.0, 0.0, 0.0], [0.0, 0.0, 50.0], [0.0, 0.0, 0.0]])]
    read = tokens(logits, embedding)
    cube, sphere = embedding.weight[11], embedding.weight[[13, 17, 19]].mean(0)
    assert_close(read[:, 1], torch.stack([cube, 0 * cube, (cube + sphere) / 3]) + tokens.marks[1])
    red, green, blue, _ = logits[0].softmax(-1)[0]
    expected = red * embedding.weight[2] + green * embedding.weight[[3, 5]].mean(0) + blue * embedding.weight[7]
    assert_close(read[0, 0], expected + tokens.marks[0])


def test_the_place_loss_equals_a_loop_over_places() -> None:
    logits, shares = torch.randn(P, 2, Q), torch.rand(P, 2, Q)
    shares[1] = IGNORED
    total = 0.0
    for pair, side, place in ((pair, side, place) for pair in (0, 2) for side in range(2) for place in range(Q)):
        p, share = logits[pair, side, place].sigmoid(), shares[pair, side, place]
        total -= (share * p.log() + (1 - share) * (1 - p).log()) / (2 * Q)
    assert_close(place_loss(logits, shares), torch.as_tensor(total))


def test_the_object_loss_is_the_mean_over_the_known_attributes_of_each_pair() -> None:
    logits = [torch.randn(P, 5), torch.randn(P, 3)]
    classes = torch.tensor([[4, 2], [IGNORED, 1], [IGNORED, IGNORED]])
    first, second = (scores.log_softmax(-1) for scores in logits)
    assert_close(object_loss(logits, classes), -(first[0, 4] + second[0, 2]) / 2 - second[1, 1])


def test_the_loss_of_changed_ignores_pairs_of_which_it_is_unknown() -> None:
    logits = torch.tensor([0.3, -1.1, 5.0])
    loss = changed_loss(logits, torch.tensor([1.0, 0.0, IGNORED]))
    assert_close(loss, -logits[0].sigmoid().log() - (1 - logits[1].sigmoid()).log())


@pytest.mark.parametrize("num_pairs", [P, 0])
def test_losses_without_any_known_target_are_0_with_gradients_of_0(num_pairs: int) -> None:
    places, changed, scores = (torch.randn(num_pairs, *shape, requires_grad=True) for shape in ((2, Q), (), (5,)))
    loss = (place_loss(places, torch.full((num_pairs, 2, Q), float(IGNORED)))
            + changed_loss(changed, torch.full((num_pairs,), float(IGNORED)))
            + object_loss([scores], torch.full((num_pairs, 1), IGNORED)))
    loss.backward()
    assert loss == 0 and not any(each.grad is None or each.grad.any() for each in (places, changed, scores))
