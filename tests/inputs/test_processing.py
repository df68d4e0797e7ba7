from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

from onediff.config import Config
from onediff.inputs.processing import IGNORED, OneDiffProcessor
from onediff.inputs.prompt import (
    DELTA_MARK,
    IMAGE_MARK,
    conversation_prompt,
    coupled_prompt,
    expand,
    pair_prompt,
    single_prompt,
    text_prompt,
)
from onediff.model.assemble import build


@pytest.fixture(scope="module")
def processor(micro: Config) -> OneDiffProcessor:
    return build(micro.model, seed=0)[1]


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("settings", [
    CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}),
    SiglipImageProcessorPil(size={"height": 56, "width": 56})])
def test_pixels_equal_the_output_of_the_image_processor(processor: OneDiffProcessor, settings: Any) -> None:
    images = [picture(120, 120), picture(31, 31, seed=1), picture(56, 56, seed=2)]
    pixels = OneDiffProcessor(settings, processor.tokenizer).pixels(images)
    expected = settings(images, return_tensors="pt")["pixel_values"]
    assert torch.allclose(pixels, expected, atol=1e-6)


def test_both_images_of_a_pair_are_transformed_alike(processor: OneDiffProcessor) -> None:
    image = picture(120, 80)
    batch = processor([(image, image)])
    assert torch.equal(batch["images"][0], batch["images"][1])
    assert batch["images"].shape == (2, 3, 96, 96)


def test_no_image_is_flipped(processor: OneDiffProcessor) -> None:
    left = Image.new("RGB", (96, 96), "black")
    left.paste("white", (0, 0, 48, 96))
    pixels = processor.pixels([left])[0].mean(0)
    assert pixels[:, :40].mean() > pixels[:, 56:].mean() + 1


def test_a_wide_image_is_padded_and_not_cropped_or_stretched(processor: OneDiffProcessor) -> None:
    wide = Image.new("RGB", (200, 100), "black")
    wide.paste("white", (0, 0, 10, 100))
    wide.paste("white", (190, 0, 200, 100))
    pixels = processor.pixels([wide])[0].mean(0)
    assert pixels[48, 1] > pixels[48, 48] + 1
    assert pixels[48, -2] > pixels[48, 48] + 1
    assert pixels[2].abs().max() < 0.1  # The padding has the mean colour, which is 0 after normalization.


def test_images_of_different_sizes_fit_into_one_batch(processor: OneDiffProcessor) -> None:
    batch = processor([(picture(64, 48), picture(200, 333)), (picture(5, 5), picture(96, 96))])
    assert batch["images"].shape == (4, 3, 96, 96)


def test_only_the_answer_and_the_end_of_sequence_token_have_labels(processor: OneDiffProcessor) -> None:
    batch = processor.answers([pair_prompt("plain", "What changed?", "the red cube is gone"),
                               text_prompt("plain", "hi", "nothing")])
    tokenizer = processor.tokenizer
    for row, answer in zip(batch["labels"], ("the red cube is gone", "nothing"), strict=True):
        assert tokenizer.decode(row[row != IGNORED]).strip() == answer + "</s>"
    assert torch.equal(batch["input_ids"][batch["labels"] != IGNORED], batch["labels"][batch["labels"] != IGNORED])


def test_questions_are_padded_on_the_left_and_answers_on_the_right(processor: OneDiffProcessor) -> None:
    prompts = [pair_prompt("plain", "What changed?", "nothing"), text_prompt("plain", "hi", "nothing")]
    assert processor.questions(prompts)["attention_mask"][1, 0] == 0
    assert processor.questions(prompts)["attention_mask"][1, -1] == 1
    assert processor.answers(prompts)["attention_mask"][1, -1] == 0


@pytest.mark.parametrize(("reading", "expected"), [("A", [32, 16, 0]), ("C", [16, 16, 0])])
def test_each_row_has_one_placeholder_for_each_visual_token(reading: str, expected: list[int], micro: Config) -> None:
    processor = build(micro.model.model_copy(update={"reading": reading}), seed=0)[1]
    prompts = [pair_prompt("plain", "a"), single_prompt("plain", "b"), text_prompt("plain", "c")]
    batch = processor.questions(prompts)
    assert (batch["input_ids"] == processor.image_token_id).sum(1).tolist() == expected
    assert (batch["input_ids"] == processor.delta_token_id).sum(1).tolist() == [16, 0, 0]  # 8 + 8 of Fusion
    assert batch["image_counts"].tolist() == [2, 1, 0]


def test_a_saved_and_loaded_processor_gives_equal_batches(processor: OneDiffProcessor, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    loaded = OneDiffProcessor.from_pretrained(tmp_path)
    pairs = [(picture(50, 70), picture(70, 50, seed=1))]
    for key, value in processor(pairs).items():
        assert torch.equal(value, loaded(pairs)[key]), key


def test_decoding_an_encoded_sentence_returns_the_sentence(processor: OneDiffProcessor) -> None:
    for text in ("the small red metal cube moved to the left", "USER: ünïcode 世界!",
                 "First image: a. Second image: b."):
        assert processor.tokenizer.decode(processor.tokenizer.encode(text, add_special_tokens=False)).strip() == text


def test_a_question_that_is_too_long_is_refused_and_a_long_answer_is_truncated(processor: OneDiffProcessor) -> None:
    with pytest.raises(ValueError, match=r"model.max_length 128 is too short for a question of \d+ tokens"):
        processor.questions([text_prompt("plain", "cube " * 200)])
    batch = processor.answers([text_prompt("plain", "hi", "cube " * 300)])
    assert batch["input_ids"].shape[1] == processor.max_length


def test_in_a_conversation_all_answers_have_labels_and_questions_have_none(processor: OneDiffProcessor) -> None:
    turns = [("What is it?", "a cube"), ("Which colour?", "it is red"), ("Sure?", "yes")]
    prompt = conversation_prompt("plain", turns, num_images=1)
    batch = processor.answers([prompt, text_prompt("plain", "hi", "there")])
    tokenizer, ids, labels = processor.tokenizer, batch["input_ids"][0], batch["labels"][0]
    assert tokenizer.decode(labels[labels != IGNORED]).replace(" ", "") == "acube</s>itisred</s>yes</s>"
    unlabelled = tokenizer.decode(ids[labels == IGNORED]).replace(" ", "")
    assert "USER:Whichcolour?ASSISTANT:" in unlabelled and "USER:Sure?ASSISTANT:" in unlabelled
    assert torch.equal(ids[labels != IGNORED], labels[labels != IGNORED])


def test_a_long_conversation_is_truncated_at_the_end(processor: OneDiffProcessor) -> None:
    prompt = conversation_prompt("plain", [("What is it?", "a cube")] * 50, num_images=0)
    assert processor.answers([prompt])["input_ids"].shape[1] == processor.max_length


def test_the_answer_of_a_coupled_prompt_contains_both_captions_in_order() -> None:
    prompt = coupled_prompt("plain", "a red cube", "a blue ball")
    assert prompt.answer == "First image: a red cube. Second image: a blue ball."
    assert prompt.num_images == 2


def test_the_vicuna_template_equals_the_published_template() -> None:
    question = single_prompt("vicuna_v1", "What is this?").question
    assert question == ("A chat between a curious user and an artificial intelligence assistant. "
                        "The assistant gives helpful, detailed, "
                        "and polite answers to the user's questions. USER: "
                        f"{IMAGE_MARK}\nWhat is this? ASSISTANT:")
    assert expand(question, tokens_per_image=3, delta_tokens=2, joined=False).count(IMAGE_MARK) == 3


def test_without_delta_tokens_a_question_has_no_delta_placeholder() -> None:
    question = pair_prompt("plain", "What?").question
    assert expand(question, tokens_per_image=1, delta_tokens=0, joined=False) == (
        f"USER: First image: {IMAGE_MARK} Second image: {IMAGE_MARK}\nWhat? ASSISTANT:")
    assert expand(question, tokens_per_image=2, delta_tokens=1, joined=True) == (
        f"USER: Both images: {IMAGE_MARK}{IMAGE_MARK} {DELTA_MARK}\nWhat? ASSISTANT:")
