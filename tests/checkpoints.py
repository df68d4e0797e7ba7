"""Small random checkpoints in the formats of the Hugging Face Hub, and the model settings that combine them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from onediff.config import Config, Model

TOWER: dict[str, Any] = {"hidden_size": 22, "intermediate_size": 19, "num_hidden_layers": 3, "num_attention_heads": 2,
                         "image_size": 12, "patch_size": 4}
DECODER: dict[str, Any] = {"vocab_size": 263, "hidden_size": 34, "intermediate_size": 23, "num_hidden_layers": 2,
                          "num_attention_heads": 17, "num_key_value_heads": 17, "max_position_embeddings": 128,
                          "bos_token_id": 0, "eos_token_id": 1}
IMAGE_ID, PATCHES = 258, 9  # image token id and patches per image of the LLaVA checkpoints


def checkpoints(folder: Path, tower: str, decoder: str) -> tuple[str, str]:
    """Save a vision tower (`clip` or `siglip`) and a decoder (`llama` or `qwen2`), and return their folders."""
    vision, language = folder / "vision", folder / "language"
    if tower == "clip":  # Published CLIP checkpoints contain a text tower too, which OneDiff must ignore.
        text = {"hidden_size": 22, "intermediate_size": 19, "num_hidden_layers": 1, "num_attention_heads": 2,
                "vocab_size": 50}
        CLIPModel(CLIPConfig(vision_config=TOWER, text_config=text, projection_dim=8)).save_pretrained(vision)
    else:
        SiglipVisionModel(SiglipVisionConfig(**TOWER)).save_pretrained(vision)
    save_image_processor(vision)
    kinds: dict[str, Any] = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}
    configuration, model = kinds[decoder]
    model(configuration(**DECODER)).save_pretrained(language)
    # Tokenizers of Qwen have no token for the beginning of a text.
    save_tokenizer(language, **({"bos_token": "<s>"} if decoder == "llama" else {}))
    return str(vision), str(language)


def llava_checkpoint(folder: Path, *, text: Any = None, vision: Any = None, **changes: Any) -> str:
    """Save a LLaVA-1.5 checkpoint with large random weights and return the folder.

    Models whose weights are near zero give similar outputs, so a comparison of outputs would not notice an error.
    """
    configuration = LlavaConfig(vision_config=vision or CLIPVisionConfig(**TOWER), text_config=text or
                                LlamaConfig(**DECODER), image_token_index=IMAGE_ID, image_seq_length=PATCHES, **changes)
    torch.manual_seed(1)
    model = LlavaForConditionalGeneration(configuration)
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(folder)
    save_image_processor(folder)
    save_tokenizer(folder, bos_token="<s>", extra_special_tokens=["<image>"])
    return str(folder)


def save_image_processor(folder: Path) -> None:
    """Save a CLIP image processor for images of 12 x 12 pixels."""
    CLIPImageProcessorPil(size={"height": 12, "width": 12}, do_center_crop=False).save_pretrained(folder)


def save_tokenizer(folder: Path, **marks: Any) -> None:
    """Save a tokenizer of 258 tokens: one for each byte, and two for the beginning and the end of a text."""
    letters = ["<s>", "</s>", *pre_tokenizers.ByteLevel.alphabet()]
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", **marks).save_pretrained(folder)


def settings(micro: Config, vision: str, language: str, *, delta: dict[str, Any] | None = None,
             **changes: Any) -> Model:
    """Return the section `model` of params.yaml for these checkpoints.

    `delta` changes keys of the section `model.delta`, and `changes` are further changes of the section `model`.
    """
    tower = micro.model.vision.model_copy(update={"path": vision, "image_px": 12, "patch_px": 4, "layers": 3})
    module = {"levels": [1, 3], "width": 13, "heads": 1, "num_tokens": 7, "fusion": None} | (delta or {})
    return micro.model.model_copy(update={
        "vision": tower, "language": language, "reading": "A", "patch_pool": 1, "max_length": 512,
        "delta": micro.model.delta.model_copy(update=module)} | changes)
