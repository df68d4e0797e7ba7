from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import DECODER, TOWER, checkpoints, settings
from PIL import Image
from transformers import (
    BertConfig,
    BertModel,
    CLIPModel,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaForCausalLM,
    MllamaConfig,
    PreTrainedConfig,
    Qwen2VLConfig,
)

from onediff.config import Config
from onediff.model.assemble import build, configure
from onediff.model.captioner import Captioner, pick_device
from onediff.model.digest import weights_digest
from onediff.model.weights import load_trained


@pytest.mark.parametrize(("tower", "decoder"), [("clip", "llama"), ("siglip", "qwen2")])
def test_each_vision_tower_works_with_each_decoder_after_saving_and_loading(tower: str, decoder: str, micro: Config,
                                                                            tmp_path: Path) -> None:
    model, processor = build(settings(micro, *checkpoints(tmp_path, tower, decoder)), seed=3)
    model.save_pretrained(tmp_path / "out")
    processor.save_pretrained(tmp_path / "out")
    pixels = np.random.default_rng(0).integers(0, 255, (2, 20, 30, 3), dtype=np.uint8)
    pair = (Image.fromarray(pixels[0]), Image.fromarray(pixels[1]))
    captions = Captioner(model, processor).caption([pair], max_new_tokens=5)
    assert Captioner.load(tmp_path / "out", device="cpu").caption([pair], max_new_tokens=5) == captions


def test_pretrained_parts_get_the_weights_of_the_checkpoints_and_new_parts_depend_on_the_seed(micro: Config,
                                                                                              tmp_path: Path) -> None:
    vision, language = checkpoints(tmp_path, "clip", "llama")
    first, repeated, third = (build(settings(micro, vision, language), seed=seed)[0] for seed in (3, 3, 4))
    assert torch.equal(first.vision.tower.embeddings.patch_embedding.weight,
                       CLIPModel.from_pretrained(vision).vision_model.embeddings.patch_embedding.weight)
    assert torch.equal(first.language.lm_head.weight, LlamaForCausalLM.from_pretrained(language).lm_head.weight)
    assert torch.equal(first.delta.tokens, repeated.delta.tokens)
    assert not torch.equal(first.delta.tokens, third.delta.tokens)


def test_the_delta_module_can_start_with_the_weights_of_bert(micro: Config, tmp_path: Path) -> None:
    bert = BertModel(BertConfig(vocab_size=17, hidden_size=13, num_hidden_layers=2, num_attention_heads=1,
                                intermediate_size=52))
    bert.save_pretrained(tmp_path / "bert")
    delta = {"init": str(tmp_path / "bert")}
    model, _ = build(settings(micro, *checkpoints(tmp_path, "clip", "llama"), delta=delta), seed=3)
    assert torch.equal(model.delta.layers[1].up.weight, bert.encoder.layer[1].intermediate.dense.weight)


def test_the_text_part_of_a_vision_language_model_becomes_the_language_model(micro: Config, tmp_path: Path) -> None:
    vision, language = checkpoints(tmp_path, "clip", "llama")
    text = {**DECODER, "head_dim": 2, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"],
            "pad_token_id": 1}
    whole = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=TOWER, mm_tokens_per_image=9))
    whole.save_pretrained(language)
    model, processor = build(settings(micro, vision, language), seed=3)
    assert type(model.language).__name__ == "Gemma3ForCausalLM"
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        assert torch.equal(model.language(input_ids=ids).logits, whole(input_ids=ids).logits)
    model.save_pretrained(tmp_path / "out")
    processor.save_pretrained(tmp_path / "out")
    assert torch.equal(load_trained(tmp_path / "out")[0].language.lm_head.weight, whole.lm_head.weight)


@pytest.mark.parametrize("configuration", [MllamaConfig(), Qwen2VLConfig()], ids=lambda config: config.model_type)
def test_a_vision_language_model_whose_text_part_is_no_decoder_is_refused(configuration: PreTrainedConfig,
                                                                          micro: Config, tmp_path: Path) -> None:
    configuration.save_pretrained(tmp_path)
    message = rf"model.language must be a decoder-only .*, but .* is a '{configuration.model_type}'; use for example"
    with pytest.raises(ValueError, match=message):
        configure(micro.model.model_copy(update={"language": str(tmp_path)}))


def test_a_model_whose_tokens_read_later_tokens_is_refused(micro: Config, tmp_path: Path) -> None:
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"decoder in which no token reads a later token, but a 'bert' is not"):
        configure(micro.model.model_copy(update={"language": str(tmp_path)}))


def test_a_vision_tower_of_another_image_size_is_refused(micro: Config) -> None:
    vision = micro.model.vision.model_copy(update={"image_px": 108})
    with pytest.raises(ValueError, match=r"model.vision.image_px must be 96, as .*, got 108; set it to 96"):
        build(micro.model.model_copy(update={"vision": vision}), seed=0)


def test_a_folder_without_a_model_is_refused(micro: Config, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"model.language: .* must be a folder with .*'make backbones'"):
        build(micro.model.model_copy(update={"language": str(tmp_path)}), seed=0)
    with pytest.raises(FileNotFoundError, match="must contain a OneDiff model"):
        Captioner.load(tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU, so device cuda is valid")
def test_device_cuda_is_refused_without_a_gpu() -> None:
    with pytest.raises(ValueError, match=r"device 'cuda' needs a GPU .*; use device auto or cpu"):
        pick_device("cuda")


def test_the_weights_digest_changes_with_the_weights(micro: Config, tmp_path: Path) -> None:
    model, _ = build(micro.model, seed=0)
    model.save_pretrained(tmp_path / "a")
    with torch.no_grad():
        model.delta.tokens[0, 0] += 1
    model.save_pretrained(tmp_path / "b")
    assert weights_digest(tmp_path / "a") != weights_digest(tmp_path / "b")
