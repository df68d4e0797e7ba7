"""Tests that an untrained OneDiff model built from a LLaVA-1.5 checkpoint gives the outputs of this LLaVA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import DECODER, IMAGE_ID, PATCHES, TOWER, llava_checkpoint, save_image_processor, settings
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)

from onediff.config import Config, Model
from onediff.inputs.processing import OneDiffProcessor
from onediff.model.assemble import build
from onediff.model.onediff import OneDiffForConditionalGeneration

TEXT_LENGTHS = (3, 11, 5)  # the number of text tokens after the images in each of the three rows of a batch


def settings_of(micro: Config, llava: str, *, tower: str | None = None, num_tokens: int = 0, **changes: Any) -> Model:
    """Return the section `model` of params.yaml for a LLaVA checkpoint and, if given, another vision tower."""
    delta = {"num_tokens": num_tokens}
    return settings(micro, tower or llava, llava, delta=delta, **{"patch_level": -2} | changes)


def batch(num_images: int) -> dict[str, Tensor]:
    """Return three rows of different lengths, each with images followed by text, padded on the right."""
    generator = torch.Generator().manual_seed(5)
    rows = [[0, *[IMAGE_ID] * PATCHES * num_images, *torch.randint(2, 258, (length,), generator=generator).tolist()]
            for length in TEXT_LENGTHS]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [1] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    labels = ids.masked_fill((ids == IMAGE_ID) | (mask == 0), -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels,
            "images": torch.randn(len(rows) * num_images, 3, 12, 12, generator=generator)}


def assert_equal_to_llava(model: OneDiffForConditionalGeneration, folder: str, num_images: int) -> None:
    """Compare the logits of all tokens except padding, and the loss, with transformers' LLaVA in float32."""
    llava = LlavaForConditionalGeneration.from_pretrained(folder)
    rows = batch(num_images)
    images, is_kept = rows.pop("images"), rows["attention_mask"].bool()
    with torch.no_grad():
        expected = llava(**rows, pixel_values=images)
        inverted = llava(**rows, pixel_values=-images)
        visual = {"image_counts": torch.full((len(TEXT_LENGTHS),), num_images), "images": images}
        loss = model(**rows, **visual).loss
        del rows["labels"]
        logits = model(**rows, **visual).logits
    assert not torch.allclose(expected.logits, inverted.logits, atol=0.1), "the images must influence the logits"
    torch.testing.assert_close(logits[is_kept], expected.logits[is_kept], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loss, expected.loss, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> str:
    return llava_checkpoint(tmp_path_factory.mktemp("llava"))


@pytest.mark.parametrize("num_images", [1, 2])
def test_a_model_without_delta_tokens_equals_the_llava_of_transformers(llava: str, num_images: int,
                                                                       micro: Config) -> None:
    model, _ = build(settings_of(micro, llava), seed=3)
    assert model.delta is None
    assert_equal_to_llava(model.eval(), llava, num_images)


@pytest.mark.parametrize(("reading", "num_tokens", "num_images"),
                         [("A", 7, 1), ("B", 7, 1), ("B", 7, 2), ("C", 0, 1), ("C", 7, 1)])
def test_every_token_layout_equals_llava_before_training(reading: str, num_tokens: int, num_images: int, llava: str,
                                                         micro: Config) -> None:
    model, _ = build(settings_of(micro, llava, reading=reading, num_tokens=num_tokens), seed=3)
    assert_equal_to_llava(model.eval(), llava, num_images)


@pytest.mark.parametrize("num_images", [1, 2])
def test_the_model_generates_the_tokens_that_llava_generates(llava: str, num_images: int, micro: Config) -> None:
    model, _ = build(settings_of(micro, llava), seed=3)
    original = LlavaForConditionalGeneration.from_pretrained(llava)
    rows = batch(num_images)
    ids, mask, images = rows["input_ids"][1:2], rows["attention_mask"][1:2], rows["images"][num_images:2 * num_images]
    options = {"max_new_tokens": 17, "do_sample": False, "pad_token_id": 1}
    expected = original.generate(input_ids=ids, attention_mask=mask, pixel_values=images, **options)[:, ids.shape[1]:]
    generated = model.eval().generate(ids, mask, torch.tensor([num_images]), images=images, **options)
    assert torch.equal(generated, expected) and len(set(expected[0].tolist())) > 3


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_from_a_llava_with_a_qwen_decoder_gives_equal_logits(tied: bool, micro: Config,
                                                                     tmp_path: Path) -> None:
    folder = llava_checkpoint(tmp_path / "llava", text=Qwen2Config(**DECODER, tie_word_embeddings=tied))
    model, _ = build(settings_of(micro, folder), seed=3)
    assert_equal_to_llava(model.eval(), folder, 1)
    model.save_pretrained(tmp_path / "out")
    assert_equal_to_llava(OneDiffForConditionalGeneration.from_pretrained(tmp_path / "out").eval(), folder, 2)


def test_all_patches_of_a_siglip_tower_are_read_because_it_has_no_class_token(micro: Config, tmp_path: Path) -> None:
    folder = llava_checkpoint(tmp_path, vision=SiglipVisionConfig(**TOWER), vision_feature_select_strategy="full")
    model, _ = build(settings_of(micro, folder), seed=3)
    assert_equal_to_llava(model.eval(), folder, 1)


def test_a_sharded_checkpoint_with_the_weight_names_of_the_hugging_face_hub_loads(llava: str, micro: Config,
                                                                                  tmp_path: Path) -> None:
    folder = Path(llava_checkpoint(tmp_path))
    # These are the weight names of the checkpoint llava-hf/llava-1.5-7b-hf.
    weights = {name.replace("vision_tower.", "vision_tower.vision_model."): weight
               for name, weight in load_file(folder / "model.safetensors").items()}
    assert "language_model.model.embed_tokens.weight" in weights and "language_model.lm_head.weight" in weights
    (folder / "model.safetensors").unlink()
    names, index = sorted(weights), {}
    for shard in range(3):
        part = {name: weights[name] for name in names[shard::3]}
        file = f"model-0000{shard + 1}-of-00003.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    model, _ = build(settings_of(micro, str(folder)), seed=3)
    assert_equal_to_llava(model.eval(), llava, 2)


def test_the_vision_tower_of_llava_may_be_replaced_by_a_tower_of_equal_width(llava: str, micro: Config,
                                                                             tmp_path: Path) -> None:
    tower = CLIPVisionModel(CLIPVisionConfig(**TOWER))
    tower.save_pretrained(tmp_path)
    save_image_processor(tmp_path)
    model, _ = build(settings_of(micro, llava, tower=str(tmp_path)), seed=3)
    patch_weight = model.vision.tower.embeddings.patch_embedding.weight
    assert torch.equal(patch_weight, tower.embeddings.patch_embedding.weight)
    original = LlavaForConditionalGeneration.from_pretrained(llava)
    assert torch.equal(model.projector[2].weight, original.model.multi_modal_projector.linear_2.weight)
    assert torch.equal(model.language.lm_head.weight, original.lm_head.weight)
    assert not torch.equal(patch_weight, original.model.vision_tower.embeddings.patch_embedding.weight)


def test_the_projector_of_llava_is_copied_even_if_patches_are_pooled(llava: str, micro: Config) -> None:
    model, processor = build(settings_of(micro, llava, patch_pool=3, num_tokens=7), seed=3)
    original = LlavaForConditionalGeneration.from_pretrained(llava).model.multi_modal_projector
    assert torch.equal(model.projector[0].weight, original.linear_1.weight) and processor.tokens_per_image == 1


def test_the_model_keeps_the_token_ids_and_the_embedding_size_of_the_checkpoint(llava: str, micro: Config) -> None:
    model, processor = build(settings_of(micro, llava, num_tokens=7), seed=3)
    assert (processor.image_token_id, processor.delta_token_id) == (IMAGE_ID, IMAGE_ID + 1)
    assert model.language.get_input_embeddings().num_embeddings == DECODER["vocab_size"]
    assert model.generation_config.eos_token_id == 1


@pytest.mark.parametrize(("changes", "message"), [
    ({"vision_feature_layer": -1}, r"level -1 of its vision tower, but model.patch_level is -2; set .* to -1"),
    ({"vision_feature_layer": [-2, -1]}, r"output of one layer .* to \[-2, -1\]; use .* a single vision_feature_layer"),
    ({"vision_feature_select_strategy": "full"}, r"must have vision_feature_select_strategy 'default', .* got 'full'"),
    ({"projector_hidden_act": "relu"}, r"must have projector_hidden_act 'gelu', .* got 'relu'"),
    ({"multimodal_projector_bias": False}, r"must have multimodal_projector_bias True, .* got False"),
    ({"image_token_index": 7}, r"placeholder <image> must have id 7, as in config.json, but it has id 258 in"),
])
def test_a_llava_whose_projector_expects_other_features_is_refused(changes: dict[str, Any], message: str, llava: str,
                                                                   micro: Config, tmp_path: Path) -> None:
    for file in Path(llava).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=message):
        build(settings_of(micro, str(tmp_path)), seed=3)


def test_the_patch_level_may_be_counted_from_the_first_or_from_the_last_layer(llava: str, micro: Config) -> None:
    # The vision tower has levels 0 to 3, so level 2 is the level that LLaVA calls -2.
    model, _ = build(settings_of(micro, llava, patch_level=2), seed=3)
    assert_equal_to_llava(model.eval(), llava, 1)


def test_a_vision_tower_of_another_width_is_refused(llava: str, micro: Config, tmp_path: Path) -> None:
    CLIPVisionModel(CLIPVisionConfig(**TOWER | {"hidden_size": 26})).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model.vision.path: the vision tower must have width 22, .* has width 26"):
        build(settings_of(micro, llava, tower=str(tmp_path)), seed=3)


def test_a_llava_as_vision_tower_of_another_language_model_is_refused(llava: str, micro: Config) -> None:
    mixed = settings_of(micro, llava).model_copy(update={"language": micro.model.language})
    with pytest.raises(ValueError, match=r"model.vision.path: the vision tower of LLaVA .*; set both keys to"):
        build(mixed, seed=3)


@pytest.mark.parametrize("size", [(640, 480), (480, 641), (1024, 887), (97, 96), (5, 4), (50, 1), (3, 500), (12, 5),
                                  (336, 336)])
def test_pixels_equal_those_of_an_image_that_is_padded_before_it_is_resized(size: tuple[int, int],
                                                                                llava: str) -> None:
    """LLaVA pads an image with int(255 * mean), to a square, and then lets the image processor of CLIP resize it."""
    clip = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    color = (122, 116, 104)
    noise = np.random.default_rng(5).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    image, square = Image.fromarray(noise), Image.new("RGB", (max(size), max(size)), color)
    square.paste(image, ((max(size) - size[0]) // 2, (max(size) - size[1]) // 2))
    expected = np.asarray(square.resize((336, 336), Image.Resampling.BICUBIC)).astype(int)
    processor = OneDiffProcessor(clip, AutoTokenizer.from_pretrained(llava))
    assert np.abs(processor.squares([image])[0] - expected).max() <= 1
