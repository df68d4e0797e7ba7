from __future__ import annotations

from pathlib import Path

import pytest
import torch
from parts import DELTA_ID, IMAGE_ID, batch_of, small

from onediff.inputs.processing import IGNORED
from onediff.model.onediff import OneDiffForConditionalGeneration


@pytest.fixture
def model() -> OneDiffForConditionalGeneration:
    return small()


COUNTS = [2, 0, 1, 2, 1]
VARIANTS = [{}, {"reading": "B"}, {"delta_inputs": "pair_and_difference"},
            {"delta_inputs": "pair_and_matched_difference"}, {"delta_cross_attention_every": 2},
            {"reading": "C"}, {"reading": "C", "patch_pool": 3}, {"delta_num_tokens": 0}, {"delta_image_ids": False},
            {"patch_pool": 3}, {"delta_levels": [0, 2, 2, 5]}, {"delta_num_tokens": 1}]


def one_row(batch: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    """Return one row of a batch without padding, together with its images."""
    first = int(batch["image_counts"][:row].sum())
    count = int(batch["image_counts"][row])
    length = int(batch["attention_mask"][row].sum())
    return {"input_ids": batch["input_ids"][row : row + 1, :length],
            "attention_mask": batch["attention_mask"][row : row + 1, :length],
            "image_counts": batch["image_counts"][row : row + 1], "images": batch["images"][first : first + count]}


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_the_logits_of_a_row_do_not_depend_on_the_other_rows_of_the_batch(variant: dict) -> None:
    model = small(**variant)
    batch = batch_of(model, COUNTS)
    together = model(**batch).logits
    for row in range(len(COUNTS)):
        alone = model(**one_row(batch, row)).logits[0]
        assert torch.allclose(together[row, : len(alone)], alone, atol=1e-5), f"row {row}"


def test_each_image_is_encoded_independently_of_the_other_images(model: OneDiffForConditionalGeneration) -> None:
    images = batch_of(model, COUNTS)["images"]
    together = model.vision(images)
    for k, image in enumerate(images):
        hidden = model.vision.tower(image[None], output_hidden_states=True).hidden_states
        for axis, level in enumerate(model.config.read_levels):
            assert torch.allclose(together[k, axis], hidden[level][0, 1:], atol=1e-6)


def test_swapping_before_and_after_swaps_the_patches_and_changes_the_delta(
        model: OneDiffForConditionalGeneration) -> None:
    states = model.vision(batch_of(model, [2])["images"])
    patches, delta = model.project_visual_tokens(states, torch.tensor([2]))
    swapped, swapped_delta = model.project_visual_tokens(states.flip(0), torch.tensor([2]))
    assert torch.allclose(patches.flip(0), swapped, atol=1e-6)
    assert not torch.allclose(delta, swapped_delta, atol=1e-4)


@pytest.mark.parametrize("reading", ["A", "B", "C"])
def test_the_after_image_influences_the_next_token(reading: str) -> None:
    model = small(reading=reading)
    batch = batch_of(model, [2])
    changed = batch | {"images": batch["images"].clone()}
    changed["images"][1] += 0.5
    assert not torch.allclose(model(**batch).logits[:, -1], model(**changed).logits[:, -1], atol=1e-5)


def test_precomputed_states_give_the_logits_of_the_images(model: OneDiffForConditionalGeneration) -> None:
    batch = batch_of(model, COUNTS)
    states = model.vision(batch["images"])
    with_states = {key: value for key, value in batch.items() if key != "images"} | {"states": states}
    assert torch.equal(model(**batch).logits, model(**with_states).logits)


def test_the_loss_is_the_mean_over_answer_tokens(model: OneDiffForConditionalGeneration) -> None:
    batch = batch_of(model, [2, 1])
    labels = torch.full_like(batch["input_ids"], IGNORED)
    labels[0, -3:-1], labels[1, 12] = torch.tensor([5, 7]), 11
    logits = model(**batch).logits.log_softmax(-1)
    by_hand = -(logits[0, -4, 5] + logits[0, -3, 7] + logits[1, 11, 11]) / 3
    assert torch.allclose(model(**batch, labels=labels).loss, by_hand, atol=1e-6)


def test_the_losses_of_micro_batches_add_up_to_the_loss_of_the_batch(model: OneDiffForConditionalGeneration) -> None:
    batch = batch_of(model, COUNTS)
    labels = batch["input_ids"].masked_fill((batch["input_ids"] >= IMAGE_ID) | (batch["attention_mask"] == 0), IGNORED)
    batch_loss = model(**batch, labels=labels).loss
    count = (labels[:, 1:] != IGNORED).sum()
    parts = []
    for row in range(len(COUNTS)):
        alone = one_row(batch, row)
        row_labels = labels[row : row + 1, : alone["input_ids"].shape[1]]
        parts.append(model(**alone, labels=row_labels, num_answer_tokens=count).loss)
    assert torch.allclose(sum(parts), batch_loss, atol=1e-6)


def test_masked_patches_do_not_influence_the_next_token_but_delta_tokens_do(
        model: OneDiffForConditionalGeneration) -> None:
    batch = batch_of(model, [2])
    mask = torch.tensor([True])
    changed = torch.where(batch["input_ids"] == IMAGE_ID, 1.0, 0.0)
    embeds = model.embed(batch["input_ids"], batch["image_counts"], images=batch["images"])
    plain = model(**batch, patch_mask=mask).logits[:, -1]
    attention = batch["attention_mask"] * (batch["input_ids"] != IMAGE_ID)
    noisy = embeds + 3.0 * changed[..., None] * torch.randn_like(embeds)
    assert torch.allclose(plain, model.language(inputs_embeds=noisy, attention_mask=attention).logits[:, -1], atol=1e-5)
    moved = embeds + (batch["input_ids"] == DELTA_ID)[..., None] * 1.0
    moved_logits = model.language(inputs_embeds=moved, attention_mask=attention).logits[:, -1]
    assert not torch.allclose(plain, moved_logits, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_saved_and_loaded_model_gives_equal_logits(variant: dict, tmp_path: Path) -> None:
    model = small(**variant)
    batch = batch_of(model, COUNTS)
    model.save_pretrained(tmp_path)
    assert [path.suffix for path in tmp_path.glob("model*")] == [".safetensors"]
    loaded = OneDiffForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_generate_equals_a_loop_of_greedy_decoding(model: OneDiffForConditionalGeneration) -> None:
    batch = batch_of(model, [2])
    row, expected = dict(batch), []
    for _ in range(5):
        token = model(**row).logits[0, -1].argmax()
        expected.append(int(token))
        row["input_ids"] = torch.cat([row["input_ids"], token.view(1, 1)], 1)
        row["attention_mask"] = torch.ones_like(row["input_ids"])
    generated = model.generate(**batch, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)
    assert generated[0].tolist() == expected


@pytest.mark.parametrize("counts", [[1], [0]])
def test_a_row_whose_placeholders_do_not_fit_its_images_is_refused(model: OneDiffForConditionalGeneration,
                                                                   counts: list[int]) -> None:
    batch = batch_of(model, [2])
    message = rf"row 0 of the batch has {counts[0]} images, .* needs {9 * counts[0]} image and 0 delta placeholders"
    with pytest.raises(ValueError, match=message):
        model(**(batch | {"image_counts": torch.tensor(counts)}))


@pytest.mark.parametrize("counts", [[0, 1], [0]])
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("reading", ["A", "B", "C"])
def test_training_rows_without_pairs_use_every_module_and_the_loss_does_not_change(counts: list[int], kept: bool,
                                                                                   reading: str) -> None:
    """Under ZeRO level 3, ranks whose rows have pairs would otherwise wait for a rank whose rows have none."""
    model = small(reading=reading)
    batch = batch_of(model, counts)
    if kept:
        batch["states"] = model.vision(batch.pop("images")).detach() if counts != [0] else torch.zeros(0, 4, 9, 11)
    labels = batch["input_ids"].clamp(max=96)
    quiet = model(**batch, labels=labels).loss
    model.train()(**batch, labels=labels).loss.backward()
    assert torch.equal(model(**batch, labels=labels).loss, quiet)
    grads = {name: p.grad for name, p in model.named_parameters() if not name.startswith("vision.")}
    assert not [name for name, grad in grads.items() if grad is None]
    assert all(not grad.any() for name, grad in grads.items() if name.startswith("delta."))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_the_loss_of_packed_rows_equals_the_loss_of_padded_rows(variant: dict, masked: bool) -> None:
    model = small(**variant)
    batch = batch_of(model, COUNTS)
    labels = batch["input_ids"].masked_fill((batch["input_ids"] >= IMAGE_ID) | (batch["attention_mask"] == 0), IGNORED)
    labels[:, 1:][batch["input_ids"][:, :-1] >= IMAGE_ID] = IGNORED  # no answer follows a placeholder
    mask = torch.tensor([masked, False, False, masked, False])
    padded = model(**batch, patch_mask=mask).logits
    by_hand = torch.nn.functional.cross_entropy(padded[:, :-1].flatten(0, 1), labels[:, 1:].flatten(),
                                                ignore_index=IGNORED)
    assert torch.allclose(model(**batch, patch_mask=mask, labels=labels).loss, by_hand, atol=1e-6)


def test_token_layout_c_reads_a_single_image_as_a_pair_of_equal_images() -> None:
    model = small(reading="C")
    states = model.vision(batch_of(model, [1])["images"])
    alone, _ = model.project_visual_tokens(states, torch.tensor([1]))
    twice, _ = model.project_visual_tokens(states.repeat(2, 1, 1, 1), torch.tensor([2]))
    assert torch.allclose(alone, twice, atol=1e-6)


def test_every_parameter_belongs_to_a_part_with_a_learning_rate() -> None:
    for reading in ("A", "B", "C"):
        model = small(reading=reading)
        parts = {model.part_of(name) for name, _ in model.named_parameters()}
        assert parts == {"vision", "delta", "projector", "language"}


def test_no_parameter_is_a_scalar() -> None:
    """DeepSpeed cannot broadcast parameters without a dimension."""
    for variant in VARIANTS:
        assert all(p.dim() for p in small(**variant).parameters()), variant
