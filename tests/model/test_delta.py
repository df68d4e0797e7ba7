from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from parts import CHANNELS, SIDE, TOKENS, WIDTH, small
from transformers import BertConfig, BertModel

from onediff.model.delta import Attention, PatchMatch, VisualDeltaModule

B, N = 3, SIDE**2


def states(seed: int) -> torch.Tensor:
    """Return random states (B, L, N, C) for the levels 1, 3, 4 and 5 that the model of `small` reads."""
    return torch.randn(B, 4, N, CHANNELS, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("num_queries", "few"), [(3, True), (5, False)])
def test_attention_equals_the_formula_of_multi_head_attention(num_queries: int, few: bool) -> None:
    torch.manual_seed(1)
    attention = Attention(12, 3).eval()
    assert attention.has_few_queries(num_queries, 7) == few
    queries, context = torch.randn(B, num_queries, 12), torch.randn(B, 7, 12)
    mixed = torch.zeros(B, num_queries, 12)
    q, k, v = attention.query(queries), attention.key(context), attention.value(context)
    for row in range(B):
        for head in range(3):
            part = slice(4 * head, 4 * head + 4)
            weights = (q[row, :, part] @ k[row, :, part].T / math.sqrt(4)).softmax(-1)
            mixed[row, :, part] = weights @ v[row, :, part]
    expected = attention.norm(queries + attention.out(mixed))
    assert torch.allclose(attention(queries, context), expected, atol=1e-6)


@pytest.mark.parametrize(("every", "layers"), [(1, 3), (2, 6)])
def test_each_level_is_read_by_one_cross_attention(every: int, layers: int) -> None:
    delta = small(delta_cross_attention_every=every).delta
    assert len(delta.layers) == layers
    assert sum(layer.cross_attention is not None for layer in delta.layers) == 3
    assert delta(states(1), states(2)).shape == (B, TOKENS, WIDTH)


@pytest.mark.parametrize("inputs", ["pair", "pair_and_difference"])
def test_the_delta_tokens_of_a_pair_do_not_depend_on_other_pairs_in_the_batch(inputs: str) -> None:
    delta = small(delta_inputs=inputs).delta
    before, after = states(1), states(2)
    together = delta(before, after)
    for row in range(B):
        assert torch.allclose(delta(before[row : row + 1], after[row : row + 1])[0], together[row], atol=1e-6)


def test_swapping_the_images_changes_the_delta_tokens() -> None:
    delta = small().delta
    assert not torch.allclose(delta(states(1), states(2)), delta(states(2), states(1)), atol=1e-3)


def test_pair_and_difference_adds_one_context_token_per_patch() -> None:
    pair, both = small().delta, small(delta_inputs="pair_and_difference").delta
    before, after = states(1)[:, 0], states(2)[:, 0]
    assert pair.read(before, after, 0).shape == (B, 2 * N, WIDTH)
    assert both.read(before, after, 0).shape == (B, 3 * N, WIDTH)
    norm = both.level_norms["0"]
    by_hand = both.reduce(norm(after) - norm(before) + both.positions + both.image_ids[2])
    assert torch.allclose(both.read(before, after, 0)[:, 2 * N :], by_hand, atol=1e-6)


def test_the_matched_difference_equals_a_loop_over_patches() -> None:
    match = PatchMatch(SIDE)
    before, after = states(1)[:, 0], states(2)[:, 0]
    only_before, only_after = match(before, after)
    for row in range(B):
        for i in range(N):
            near = torch.tensor([(i // SIDE - j // SIDE) ** 2 + (i % SIDE - j % SIDE) ** 2 for j in range(N)])
            for image, partner, difference in ((before, after, only_before), (after, before, only_after)):
                weights = (partner[row] @ image[row, i] / CHANNELS**0.5 - 0.3 * near).softmax(0)
                assert torch.allclose(difference[row, i], image[row, i] - weights @ partner[row], atol=1e-5)


def test_an_image_shifted_by_one_patch_has_a_small_matched_difference() -> None:
    noise = torch.randn(1, 8, 8, 64, generator=torch.Generator().manual_seed(0))
    scene = 4.0 * torch.nn.functional.layer_norm(noise, (64,))
    shifted = scene.roll(1, dims=2)
    only_before, _ = PatchMatch(8)(scene.flatten(1, 2), shifted.flatten(1, 2))
    inner = only_before.view(8, 8, 64)[:, :-1].norm(dim=-1)
    assert inner.max() < 0.05 * (scene - shifted).norm(dim=-1).mean()


def test_the_delta_module_reads_only_the_levels_in_delta_levels() -> None:
    delta = small(delta_levels=[1, 3, 3]).delta  # states contain levels 1, 3 and 4; level 4 is for patches
    before, after = states(1)[:, :3], states(2)[:, :3]
    changed = before.clone()
    changed[:, 2] += 1.0
    assert torch.equal(delta(before, after), delta(changed, after))
    changed[:, 1] += torch.randn(N, CHANNELS)
    assert not torch.allclose(delta(before, after), delta(changed, after))


def test_bert_layers_are_copied_and_cross_attention_keeps_random_weights(tmp_path: Path) -> None:
    BertModel(BertConfig(vocab_size=17, hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=1,
                         intermediate_size=4 * WIDTH)).save_pretrained(tmp_path)
    bert = BertModel.from_pretrained(tmp_path)
    delta: VisualDeltaModule = small().delta
    fresh = delta.layers[2].cross_attention.query.weight.clone()
    delta.copy_bert(bert)
    assert torch.equal(delta.layers[2].self_attention.value.weight, bert.encoder.layer[2].attention.self.value.weight)
    assert torch.equal(delta.layers[1].down.bias, bert.encoder.layer[1].output.dense.bias)
    assert torch.equal(delta.layers[2].cross_attention.query.weight, fresh)


def test_a_bert_of_another_width_is_refused() -> None:
    bert = BertModel(BertConfig(vocab_size=17, hidden_size=12, num_hidden_layers=3, num_attention_heads=1,
                                intermediate_size=20))
    message = r"model.delta.init: BERT must have at least 3 layers of width 13 .* got 3 layers of width 12"
    with pytest.raises(ValueError, match=message):
        small().delta.copy_bert(bert)
