"""Tests of the complete captioner with the small random model of parts.py.

Shapes:  M images of the batch, L levels of the vision tower, N patches per image, C width of the vision tower,
         B rows of the batch, S length of the token sequence.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from parts import CHANNELS, DELTA_ID, FUSION, IMAGE_ID, SIDE, VOCAB, batch_of, small
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from transformers import (
    FalconH1Config,
    Gemma2Config,
    Gemma3TextConfig,
    GraniteMoeHybridConfig,
    Lfm2Config,
    LlamaConfig,
    PreTrainedConfig,
    Qwen3_5TextConfig,
)

from onediff.inputs.processing import IGNORED
from onediff.model.exactness import choices_of_layers, randomized, shrunken
from onediff.model.onediff import OneDiffForConditionalGeneration

IMAGE_COUNTS = [2, 0, 1, 2, 1]  # a row has a pair of images, a single image, or only text
TOKEN_LAYOUTS = ["A", "B", "C"]
VARIANTS: list[dict[str, Any]] = [  # changes of the OneDiffConfig of the small model
    {}, {"reading": "B"}, {"reading": "C"}, {"reading": "C", "patch_pool": 3}, {"patch_pool": 3},
    {"delta_inputs": "pair_and_difference"}, {"delta_inputs": "pair_and_matched_difference"},
    {"delta_cross_attention_every": 2}, {"delta_levels": [0, 2, 2, 5]}, {"delta_image_ids": False},
    {"delta_num_tokens": 1}, {"delta_num_tokens": 0}, FUSION, FUSION | {"reading": "C", "patch_pool": 3}]


@pytest.fixture
def model() -> OneDiffForConditionalGeneration:
    return small()


def one_row(batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """Return a batch that contains a single row of `batch`, without padding, and the images of this row."""
    first_image = int(batch["image_counts"][:row].sum())
    num_images = int(batch["image_counts"][row])
    length = int(batch["attention_mask"][row].sum())
    return {"input_ids": batch["input_ids"][row : row + 1, :length],
            "attention_mask": batch["attention_mask"][row : row + 1, :length],
            "image_counts": batch["image_counts"][row : row + 1],
            "images": batch["images"][first_image : first_image + num_images]}


def text_labels(batch: dict[str, Tensor]) -> Tensor:
    """Return labels (B, S) that count each text token as an answer token, but no placeholder and no padding."""
    is_ignored = (batch["input_ids"] >= IMAGE_ID) | (batch["attention_mask"] == 0)
    return batch["input_ids"].masked_fill(is_ignored, IGNORED)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_the_logits_of_a_row_do_not_depend_on_the_other_rows_of_the_batch(variant: dict[str, Any]) -> None:
    model = small(**variant)
    batch = batch_of(model, IMAGE_COUNTS)
    batch_logits = model(**batch).logits
    for row in range(len(IMAGE_COUNTS)):
        row_logits = model(**one_row(batch, row)).logits[0]
        assert_close(batch_logits[row, : len(row_logits)], row_logits)


def test_a_model_with_fusion_needs_pixels_besides_states_and_gives_equal_logits() -> None:
    model = small(**FUSION)
    batch = batch_of(model, IMAGE_COUNTS)
    states = model.vision(batch["images"])
    assert torch.equal(model(**batch, states=states).logits, model(**batch).logits)
    with pytest.raises(ValueError, match=r"delta\.fusion compares pixels, so it needs `images` besides `states`"):
        model(**batch | {"images": None, "states": states})


def test_states_of_the_vision_tower_may_replace_the_images(model: OneDiffForConditionalGeneration) -> None:
    batch = batch_of(model, IMAGE_COUNTS)
    expected = model(**batch).logits
    batch["states"] = model.vision(batch.pop("images"))
    assert torch.equal(model(**batch).logits, expected)


def test_the_loss_is_the_mean_over_the_answer_tokens_of_all_rows(model: OneDiffForConditionalGeneration) -> None:
    batch = batch_of(model, [2, 1])
    labels = torch.full_like(batch["input_ids"], IGNORED)
    labels[0, -3], labels[0, -2], labels[1, 12] = 5, 7, 11
    logs = model(**batch).logits.log_softmax(-1)
    # The logits at a position predict the token at the next position.
    expected = -(logs[0, -4, 5] + logs[0, -3, 7] + logs[1, 11, 11]) / 3
    assert_close(model(**batch, labels=labels).loss, expected)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_the_loss_of_packed_rows_equals_the_loss_of_padded_rows(variant: dict[str, Any], masked: bool) -> None:
    """`forward` packs the rows into one sequence if labels are given, and otherwise pads them to equal length."""
    model = small(**variant)
    batch = batch_of(model, IMAGE_COUNTS)
    batch["patch_mask"] = torch.tensor([masked, False, False, masked, False])
    labels = text_labels(batch)
    # The packed rows have no logits at masked placeholders, so no answer token may follow a placeholder.
    labels[:, 1:][batch["input_ids"][:, :-1] >= IMAGE_ID] = IGNORED
    padded_logits = model(**batch).logits
    expected = cross_entropy(padded_logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
    assert_close(model(**batch, labels=labels).loss, expected)


# The rows are longer than the window of Gemma 3. In the last four decoders, other layers than attention mix tokens, so
# that packed rows would disturb each other.
@pytest.mark.parametrize("text", [
    LlamaConfig(), Gemma3TextConfig(), Gemma2Config(), Lfm2Config(layer_types=["conv", "full_attention"] * 16),
    FalconH1Config(mamba_d_ssm=1536, mamba_n_heads=24), GraniteMoeHybridConfig(), Qwen3_5TextConfig()],
    ids=lambda config: config.model_type)
def test_the_losses_of_micro_batches_add_up_to_the_loss_of_the_batch(text: PreTrainedConfig) -> None:
    model = small(text_config=shrunken(text, next(choices_of_layers(text))))
    with torch.no_grad():
        randomized(model.language)
    batch = batch_of(model, IMAGE_COUNTS)
    labels = text_labels(batch)
    num_answer_tokens = (labels[:, 1:] != IGNORED).sum()
    losses = []
    for row in range(len(IMAGE_COUNTS)):
        micro_batch = one_row(batch, row)
        row_labels = labels[row : row + 1, : micro_batch["input_ids"].shape[1]]
        losses.append(model(**micro_batch, labels=row_labels, total_weight=num_answer_tokens).loss)
    assert_close(sum(losses), model(**batch, labels=labels).loss, rtol=1e-5, atol=0)


def test_with_row_weights_the_loss_is_the_weighted_mean_over_answer_tokens(
        model: OneDiffForConditionalGeneration) -> None:
    batch = batch_of(model, [2, 1, 0])
    labels, weights = text_labels(batch), torch.tensor([0.5, 3.0, 0.25])
    logs = model(**batch).logits.log_softmax(-1)
    losses = [-logs[row, place, labels[row, place + 1]] for row, place in (labels[:, 1:] != IGNORED).nonzero().tolist()]
    weight_of = [weights[row] for row, _ in (labels[:, 1:] != IGNORED).nonzero().tolist()]
    total = sum(weight * loss for weight, loss in zip(weight_of, losses, strict=True))
    assert_close(model(**batch, labels=labels, row_weights=weights).loss, total / sum(weight_of))
    assert_close(model(**batch, labels=labels, row_weights=weights, total_weight=torch.tensor(7.0)).loss, total / 7)


def test_generate_equals_a_loop_of_greedy_decoding(model: OneDiffForConditionalGeneration) -> None:
    batch = batch_of(model, [2])
    prompt, expected = dict(batch), []
    for _ in range(5):
        token = model(**prompt).logits[0, -1].argmax()
        expected.append(int(token))
        prompt["input_ids"] = torch.cat([prompt["input_ids"], token.view(1, 1)], 1)
        prompt["attention_mask"] = torch.ones_like(prompt["input_ids"])
    generated = model.generate(**batch, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)
    assert generated[0].tolist() == expected


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_saved_and_loaded_model_gives_equal_logits(variant: dict[str, Any], tmp_path: Path) -> None:
    model = small(**variant)
    batch = batch_of(model, IMAGE_COUNTS)
    model.save_pretrained(tmp_path)
    assert [path.suffix for path in tmp_path.glob("model*")] == [".safetensors"]
    loaded = OneDiffForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert_close(loaded(**batch).logits, model(**batch).logits, atol=1e-6, rtol=0)


@pytest.mark.parametrize("num_images", [1, 0])
def test_a_row_whose_placeholders_do_not_match_its_images_is_refused(model: OneDiffForConditionalGeneration,
                                                                     num_images: int) -> None:
    prompt_of_a_pair = batch_of(model, [2])
    batch = prompt_of_a_pair | {"image_counts": torch.tensor([num_images])}
    message = rf"row 0 of the batch has {num_images} images, .* {9 * num_images} image placeholders and 0 delta placeh"
    with pytest.raises(ValueError, match=message):
        model(**batch)


def test_swapping_before_and_after_swaps_the_patches_and_changes_the_delta_tokens(
        model: OneDiffForConditionalGeneration) -> None:
    states, counts = model.vision(batch_of(model, [2])["images"]), torch.tensor([2])
    patches, delta = model.project_visual_tokens(states, counts)
    swapped_patches, swapped_delta = model.project_visual_tokens(states.flip(0), counts)
    assert_close(swapped_patches, patches.flip(0))
    assert not torch.allclose(swapped_delta, delta, atol=1e-4)


@pytest.mark.parametrize("reading", TOKEN_LAYOUTS)
def test_the_after_image_influences_the_next_token(reading: str) -> None:
    model = small(reading=reading)
    batch = batch_of(model, [2])
    next_token = model(**batch).logits[:, -1]
    batch["images"][1] += 0.5
    assert not torch.allclose(model(**batch).logits[:, -1], next_token, atol=1e-5)


def test_masked_patches_do_not_influence_the_next_token_but_delta_tokens_do(
        model: OneDiffForConditionalGeneration) -> None:
    batch = batch_of(model, [2])
    is_patch, is_delta = batch["input_ids"] == IMAGE_ID, batch["input_ids"] == DELTA_ID
    embeds, _ = model.embed(batch["input_ids"], batch["image_counts"], images=batch["images"])

    def next_token(embeds: Tensor) -> Tensor:
        return model.language(inputs_embeds=embeds, attention_mask=batch["attention_mask"] * ~is_patch).logits[:, -1]

    masked = model(**batch, patch_mask=torch.tensor([True])).logits[:, -1]
    assert_close(next_token(embeds + 3.0 * is_patch[..., None] * torch.randn_like(embeds)), masked)
    assert not torch.allclose(next_token(embeds + 1.0 * is_delta[..., None]), masked, atol=1e-4)


@pytest.mark.parametrize("counts", [[0, 1], [0]])
@pytest.mark.parametrize("precomputed", [False, True])
@pytest.mark.parametrize("variant", [{"reading": "A"}, {"reading": "B"}, {"reading": "C"}, FUSION,
                                     FUSION | {"reading": "C"}], ids=str)
def test_training_rows_without_pairs_give_every_module_a_gradient_and_do_not_change_the_loss(
        counts: list[int], precomputed: bool, variant: dict[str, Any]) -> None:
    """Under ZeRO level 3, the other ranks would wait forever for a rank that skips the delta module."""
    model = small(**variant)
    batch = batch_of(model, counts)
    batch["labels"] = batch["input_ids"].clamp(max=VOCAB - 1)
    if precomputed:
        images, num_levels = batch["images"], len(model.config.read_levels)
        batch["states"] = (model.vision(images).detach() if len(images)
                           else torch.zeros(0, num_levels, SIDE * SIDE, CHANNELS))
    expected = model.eval()(**batch).loss
    loss = model.train()(**batch).loss
    loss.backward()
    assert torch.equal(loss, expected)
    gradients = {name: p.grad for name, p in model.named_parameters() if not name.startswith("vision.")}
    assert not [name for name, gradient in gradients.items() if gradient is None]
    assert not [name for name, gradient in gradients.items() if name.startswith(("delta.", "fusion."))
                and gradient.any()]


def test_token_layout_c_reads_a_single_image_as_a_pair_of_equal_images() -> None:
    model = small(reading="C")
    states = model.vision(batch_of(model, [1])["images"])
    single, _ = model.project_visual_tokens(states, torch.tensor([1]))
    pair, _ = model.project_visual_tokens(states.repeat(2, 1, 1, 1), torch.tensor([2]))
    assert_close(single, pair)


@pytest.mark.parametrize("reading", TOKEN_LAYOUTS)
def test_every_parameter_belongs_to_a_part_with_a_learning_rate(reading: str) -> None:
    model = small(reading=reading)
    assert {model.part_of(name) for name, _ in model.named_parameters()} == {
        "vision", "delta", "projector", "language"}


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_no_parameter_is_a_scalar(variant: dict[str, Any]) -> None:
    """DeepSpeed cannot broadcast parameters without a dimension."""
    assert not [name for name, p in small(**variant).named_parameters() if p.dim() == 0]
