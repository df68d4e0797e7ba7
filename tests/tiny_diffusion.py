"""Small random models in the formats of CLIP and of the InstructPix2Pix pipeline of diffusers."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    EulerAncestralDiscreteScheduler,
    StableDiffusionInstructPix2PixPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
)

WIDTH, LONGEST = 32, 77


def save_clip(folder: Path) -> str:
    """Save a CLIPModel with tokenizer and image processor, and return the path for params.yaml."""
    torch.manual_seed(3)
    tokenizer = _tokenizer(folder)
    vision = CLIPVisionConfig(hidden_size=WIDTH, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4,
                              image_size=32, patch_size=8)
    config = CLIPConfig(text_config=_text(len(tokenizer)).to_dict(), vision_config=vision.to_dict(), projection_dim=24)
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


def save_pipeline(folder: Path) -> str:
    """Save an InstructPix2Pix pipeline, and return the path for params.yaml."""
    torch.manual_seed(5)
    tokenizer = _tokenizer(folder / "vocabulary")
    unet = UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, sample_size=8, in_channels=8, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH, attention_head_dim=8, norm_num_groups=8)
    vae = AutoencoderKL(block_out_channels=[32, 64], in_channels=3, out_channels=3, latent_channels=4,
                        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2)
    scheduler = EulerAncestralDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    StableDiffusionInstructPix2PixPipeline(
        unet=unet, vae=vae, scheduler=scheduler, text_encoder=CLIPTextModel(_text(len(tokenizer))), tokenizer=tokenizer,
        safety_checker=None, feature_extractor=None, image_encoder=None, requires_safety_checker=False,
    ).save_pretrained(folder)
    return str(folder)


def _text(vocabulary: int) -> CLIPTextConfig:
    return CLIPTextConfig(vocab_size=vocabulary, hidden_size=WIDTH, intermediate_size=37, num_hidden_layers=2,
                          num_attention_heads=4, max_position_embeddings=LONGEST, bos_token_id=0, eos_token_id=1,
                          pad_token_id=1)


def _tokenizer(folder: Path) -> CLIPTokenizer:
    """Return a tokenizer of the class that CLIP uses, whose tokens are single letters."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(code) for code in range(33, 127)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=LONGEST)
