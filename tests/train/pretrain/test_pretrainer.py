from __future__ import annotations

import numpy as np
import pytest
import torch

from onediff.train.pretrain.backbones import train_tokenizer
from onediff.train.pretrain.examples import ATTRIBUTES, UNKNOWN, make_example, make_plain_example
from onediff.train.pretrain.pretrainer import Batch, Pretrainer, attribute_accuracy, dense_loss, pooled
from onediff.train.pretrain.store import Examples


@pytest.fixture(scope="module")
def examples() -> Examples:
    return Examples.of([*(make_plain_example(seed) for seed in range(3)), *(make_example(seed) for seed in range(4))])


@pytest.fixture(scope="module")
def batch(examples: Examples) -> Batch:
    tokenizer = train_tokenizer([str(text) for text in examples.caption])
    return Batch.of(examples, np.arange(len(examples)), tokenizer, captions=2)


def test_only_the_first_captions_of_a_batch_become_tokens(batch: Batch) -> None:
    assert batch.captioned.tolist() == [0, 1]
    assert len(batch.tokens) == 2 and (batch.tokens[:, 0] == 1).all()


def test_right_outputs_have_a_smaller_loss_than_wrong_ones(batch: Batch) -> None:
    def outputs(shift: int) -> torch.Tensor:
        attributes = [8 * torch.nn.functional.one_hot((batch.attributes[..., k].clamp_min(0) + shift) % len(options),
                                                      len(options)).float()
                      for k, options in enumerate(ATTRIBUTES.values())]
        return torch.cat([*attributes, 8 * (2 * batch.present[..., None] - 1), batch.offsets.nan_to_num(),
                          batch.light], dim=-1)

    assert dense_loss(outputs(0), batch) < 0.1 < dense_loss(outputs(1), batch) - 5


def test_both_losses_reach_the_tower_and_unknown_labels_do_not_matter(batch: Batch) -> None:
    torch.manual_seed(0)
    model = Pretrainer(1024)
    for loss in model(batch):
        model.zero_grad()
        loss.backward(retain_graph=True)
        assert model.tower.embeddings.patch_embedding.weight.grad.abs().sum() > 0
    unknown = Batch(**vars(batch) | {"attributes": torch.full_like(batch.attributes, UNKNOWN)})
    unknown.attributes[0, 0, :] = 0
    assert dense_loss(torch.zeros(7, 64, 23), unknown).isfinite()


def test_the_accuracy_equals_a_count_over_known_patches(examples: Examples) -> None:
    torch.manual_seed(0)
    model = Pretrainer(7)
    with torch.no_grad():
        model.heads[1][1].weight.zero_()
        model.heads[1][1].bias.zero_()
        model.heads[1][1].bias[1] = 1.0  # The head always names the second shape.
    shapes = examples.attributes[..., 0]
    expected = (shapes == 1).sum() / (shapes != UNKNOWN).sum()
    assert attribute_accuracy(model, examples, batch_size=3)["shape_accuracy"] == pytest.approx(expected, abs=1e-4)


def test_pooling_averages_two_by_two_patches() -> None:
    patches = torch.arange(64.0).reshape(1, 64, 1)
    assert pooled(patches)[0, 0, 0] == (0 + 1 + 8 + 9) / 4
