"""Tests of the Visual Delta Module with the small random model of parts.py.

Shapes:  B pairs, L levels of the vision tower, N patches per image, C width of the vision tower, K delta tokens,
         W width of the delta module, Q queries and S context tokens of an attention layer, E width of this layer,
         H heads of this layer.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from parts import CHANNELS, SIDE, TOKENS, WIDTH, small
from torch import Tensor
from torch.testing import assert_close
from transformers import BertConfig, BertModel

from onediff.model.delta import Attention, PatchMatch, is_inherited

B, N, C, K, W = 5, SIDE**2, CHANNELS, TOKENS, WIDTH


def random_states(seed: int) -> Tensor:
    """Return states (B, L, N, C) at levels 1, 3, 4 and 5, which the small model reads from the vision tower."""
    return torch.randn(B, 4, N, C, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def before() -> Tensor:
    return random_states(seed=1)


@pytest.fixture
def after() -> Tensor:
    return random_states(seed=2)


def bert(*, width: int) -> BertModel:
    return BertModel(BertConfig(vocab_size=17, hidden_size=width, num_hidden_layers=3, num_attention_heads=1,
                                intermediate_size=4 * width))


@pytest.mark.parametrize(("Q", "has_few_queries"), [(3, True), (5, False)])
def test_attention_equals_a_loop_over_rows_and_heads(Q: int, has_few_queries: bool) -> None:
    S, E, H = 7, 12, 3
    torch.manual_seed(1)
    attention = Attention(E, H)
    assert attention.has_few_queries(Q, S) == has_few_queries
    queries, context = torch.randn(B, Q, E), torch.randn(B, S, E)
    query, key, value = attention.query(queries), attention.key(context), attention.value(context)
    mixed = torch.zeros(B, Q, E)
    for row in range(B):
        for head in range(H):
            columns = slice(head * E // H, (head + 1) * E // H)
            weights = (query[row, :, columns] @ key[row, :, columns].T / math.sqrt(E // H)).softmax(-1)
            mixed[row, :, columns] = weights @ value[row, :, columns]
    assert_close(attention(queries, context), attention.norm(queries + attention.out(mixed)))


def test_the_matched_difference_equals_a_loop_over_patches(before: Tensor, after: Tensor) -> None:
    match = PatchMatch(SIDE)
    differences = match(before[:, 0], after[:, 0])
    for image, other, difference in zip((before[:, 0], after[:, 0]), (after[:, 0], before[:, 0]), differences,
                                        strict=True):
        for pair in range(B):
            for i in range(N):
                distances = torch.tensor([(i // SIDE - j // SIDE) ** 2 + (i % SIDE - j % SIDE) ** 2 for j in range(N)])
                similarities = other[pair] @ image[pair, i] / math.sqrt(C)
                weights = (match.sharpness * similarities - match.nearness * distances).softmax(0)
                assert_close(difference[pair, i], image[pair, i] - weights @ other[pair])


def test_pair_and_difference_adds_one_context_token_per_patch(before: Tensor, after: Tensor) -> None:
    pair, pair_and_difference = small().delta, small(delta_inputs="pair_and_difference").delta
    before, after = before[:, 0], after[:, 0]
    context = pair_and_difference.read(before, after, level=0)
    assert pair.read(before, after, level=0).shape == (B, 2 * N, W)
    assert context.shape == (B, 3 * N, W)
    norm = pair_and_difference.level_norms["0"]
    difference = norm(after) - norm(before) + pair_and_difference.positions + pair_and_difference.image_ids[2]
    assert_close(context[:, 2 * N :], pair_and_difference.reduce(difference))


def test_bert_weights_are_copied_except_to_the_cross_attention(tmp_path: Path) -> None:
    bert(width=W).save_pretrained(tmp_path)
    source = BertModel.from_pretrained(tmp_path).encoder.layer
    delta = small().delta
    random_weight = delta.layers[2].cross_attention.query.weight.clone()
    delta.copy_bert(BertModel.from_pretrained(tmp_path))
    assert torch.equal(delta.layers[2].self_attention.value.weight, source[2].attention.self.value.weight)
    assert torch.equal(delta.layers[1].down.bias, source[1].output.dense.bias)
    assert torch.equal(delta.layers[2].cross_attention.query.weight, random_weight)


def test_exactly_the_weights_that_come_from_bert_are_inherited() -> None:
    model = small()
    before = {name: value.clone() for name, value in model.named_parameters()}
    model.delta.copy_bert(bert(width=W))
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    inherited = {name for name in before if is_inherited(name)}
    # The biases and normalizations of a new BERT have constant values, which a new delta module may have too.
    assert changed and changed <= inherited
    assert {name for name in inherited if name.endswith("weight") and "norm" not in name} <= changed


def test_a_bert_of_another_width_is_refused() -> None:
    message = r"model.delta.init: BERT must have at least 3 layers of width 13 .* got 3 layers of width 12"
    with pytest.raises(ValueError, match=message):
        small().delta.copy_bert(bert(width=12))


@pytest.mark.parametrize(("every", "num_layers"), [(1, 3), (2, 6)])
def test_each_of_three_levels_is_read_by_one_cross_attention(every: int, num_layers: int, before: Tensor,
                                                             after: Tensor) -> None:
    delta = small(delta_levels=[1, 3, 5], delta_cross_attention_every=every).delta
    assert len(delta.layers) == num_layers
    assert sum(layer.cross_attention is not None for layer in delta.layers) == 3
    assert delta(before, after).shape == (B, K, W)


@pytest.mark.parametrize("inputs", ["pair", "pair_and_difference", "pair_and_matched_difference"])
def test_the_delta_tokens_of_a_pair_do_not_depend_on_other_pairs_in_the_batch(inputs: str, before: Tensor,
                                                                              after: Tensor) -> None:
    delta = small(delta_inputs=inputs).delta
    tokens = delta(before, after)
    for pair in range(B):
        assert_close(delta(before[pair : pair + 1], after[pair : pair + 1])[0], tokens[pair])


def test_swapping_the_images_changes_the_delta_tokens(before: Tensor, after: Tensor) -> None:
    delta = small().delta
    assert not torch.allclose(delta(before, after), delta(after, before), atol=1e-3)


def test_the_delta_module_reads_only_the_levels_in_delta_levels(before: Tensor, after: Tensor) -> None:
    # This model reads levels 1, 3 and 4 from the vision tower, but level 4 only for the patch tokens.
    delta = small(delta_levels=[1, 3, 3]).delta
    before, after = before[:, :3], after[:, :3]
    tokens = delta(before, after)
    before[:, 2] += 1.0
    assert torch.equal(delta(before, after), tokens)
    before[:, 1] += torch.randn(N, C)
    assert not torch.allclose(delta(before, after), tokens)


def test_an_image_shifted_by_one_patch_has_a_small_matched_difference() -> None:
    side, channels = 8, 64
    noise = torch.randn(1, side, side, channels, generator=torch.Generator().manual_seed(0))
    image = 4.0 * torch.nn.functional.layer_norm(noise, (channels,))
    shifted = image.roll(1, dims=2)
    difference, _ = PatchMatch(side)(image.flatten(1, 2), shifted.flatten(1, 2))
    # The patches of the last column have no match near by, because `roll` moves them to the first column.
    norms = difference.view(side, side, channels)[:, :-1].norm(dim=-1)
    assert norms.max() < 0.05 * (image - shifted).norm(dim=-1).mean()
