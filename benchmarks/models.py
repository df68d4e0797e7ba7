"""The models that the benchmarks compare: OneDiff, and LLaVA of transformers with an equal vision encoder and decoder.

All weights are random, because trained weights would not change the speed. There are three presets (sizes as width x
layers):

tiny    the sizes of presets/tiny.yaml: CLIP 128 x 4 at 96 px (64 patches), Llama 128 x 3 with 700 tokens
small   about 50M parameters: CLIP 384 x 8 at 112 px (64 patches), Llama 512 x 8 with 8,192 tokens,
        Visual Delta Module (VDM) 384 x 4
paper   presets/paper.yaml: CLIP-L/14 at 336 px (576 patches), Vicuna-7B, VDM 768 x 6, in bfloat16; for a GPU

Both models use the tokenizer of the tiny preset. The prompt template comes from the preset; `small` uses the template
of `tiny`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from onediff.config import Config, load_params
from onediff.inputs.processing import OneDiffProcessor, load_image_processor
from onediff.model.assemble import configure
from onediff.model.configuration import OneDiffConfig
from onediff.model.onediff import OneDiffForConditionalGeneration

PRESETS = ("tiny", "small", "paper")
HOME = Path(".onediff/benchmarks")
BACKBONES, ARCHITECTURES = Path("presets/backbones/tiny"), Path("presets/architectures")
ALL_PATCHES: dict[str, Any] = {"patch_pool": 1, "reading": "A"}  # OneDiff reads every patch of both images, like LLaVA.
SMALL_TOWER = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 6,
               "image_size": 112, "patch_size": 14}
SMALL_LANGUAGE = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8,
                  "vocab_size": 8192, "max_position_embeddings": 2048, "tie_word_embeddings": True,
                  "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def settings(preset: str, **model: Any) -> Config:
    """Return the settings of a preset, with backbones that need only a config.json and no weights.

    `model` replaces values of the section `model`; its key `num_tokens` replaces `model.delta.num_tokens`.
    Raises ValueError for an unknown preset.
    """
    if preset not in PRESETS:
        raise ValueError(f"--preset {preset}: must be one of {', '.join(PRESETS)}; choose one of them")
    values = load_params(Path(f"presets/{'paper' if preset == 'paper' else 'tiny'}.yaml")).model_dump(mode="json")
    section = values["model"]
    if preset == "small":
        for folder, configuration in ((HOME / "small/vision", CLIPVisionConfig(**SMALL_TOWER)),
                                      (HOME / "small/language", LlamaConfig(**SMALL_LANGUAGE))):
            if not (folder / "config.json").exists():
                configuration.save_pretrained(folder)
        section["vision"] |= {"path": str(HOME / "small/vision"), "image_px": 112, "patch_px": 14, "layers": 8}
        section["language"] = str(HOME / "small/language")
        section["delta"] |= {"width": 384, "heads": 6, "levels": [4, 4, 8, 8]}
    elif preset == "paper":
        section["vision"]["path"] = str(ARCHITECTURES / section["vision"]["path"])
        section["language"] = str(ARCHITECTURES / section["language"])
        section["delta"]["init"] = "random"
    # The benchmarks measure the form of the paper, whose Visual Delta Module reads only patches of the tower.
    section["delta"]["fusion"] = values["tune"]["auxiliary"] = None
    section["delta"]["num_tokens"] = model.pop("num_tokens", section["delta"]["num_tokens"])
    section |= {"max_length": 2048} | model
    return Config.model_validate(values)


def processor_of(config: Config) -> OneDiffProcessor:
    """Return the processor that prepares images and texts for a model with these settings."""
    images, px, model = load_image_processor(BACKBONES / "vision"), config.model.vision.image_px, config.model
    images.size = images.crop_size = {"height": px, "width": px}
    side = px // model.vision.patch_px // model.patch_pool
    return OneDiffProcessor(images, AutoTokenizer.from_pretrained(BACKBONES / "language"), tokens_per_image=side**2,
                            delta_tokens=0 if model.reading == "B" else model.delta.num_tokens,
                            images_joined=model.reading == "C", template=model.template, max_length=model.max_length)


def configuration_of(config: Config, processor: OneDiffProcessor) -> OneDiffConfig:
    """Return the configuration of the OneDiff model, with the ids of the placeholder tokens of the processor."""
    configuration = configure(config.model)
    configuration.image_token_id, configuration.delta_token_id = processor.image_token_id, processor.delta_token_id
    return configuration


def onediff(config: Config, device: str) -> tuple[OneDiffForConditionalGeneration, OneDiffProcessor]:
    """Create OneDiff with random weights, and the processor for its images and texts.

    On a GPU, the weights have the precision of the preset; on a CPU, float32, because bfloat16 is much slower there.
    """
    processor = processor_of(config)
    with _created_on(device, config):
        return OneDiffForConditionalGeneration(configuration_of(config, processor)), processor


def llava(config: Config, device: str) -> tuple[LlavaForConditionalGeneration, OneDiffProcessor]:
    """Create LLaVA of transformers with SDPA and random weights, and the processor for its images and texts.

    LLaVA reads every patch of both images; its prompts contain no delta tokens.
    """
    processor = processor_of(settings_without_delta(config))
    ours = configuration_of(settings_without_delta(config), processor)
    text = deepcopy(ours.text_config)
    # LLaVA first looks up an embedding for each image placeholder, so the embedding table must contain this token.
    text.vocab_size = max(text.vocab_size, ours.image_token_id + 1)
    configuration = LlavaConfig(
        vision_config=ours.vision_config, text_config=text, image_token_index=ours.image_token_id,
        image_seq_length=ours.num_patches, vision_feature_layer=ours.patch_level,
        tie_word_embeddings=text.tie_word_embeddings)
    with _created_on(device, config):
        return LlavaForConditionalGeneration._from_config(configuration, attn_implementation="sdpa"), processor


def settings_without_delta(config: Config) -> Config:
    """Change the settings so that OneDiff computes the function of LLaVA: all patches, without Visual Delta Module."""
    model = config.model
    return config.model_copy(update={"model": model.model_copy(update={
        **ALL_PATCHES, "delta": model.delta.model_copy(update={"num_tokens": 0})})})


@contextmanager
def _created_on(device: str, config: Config) -> Iterator[None]:
    """Create all modules of the `with` block with random weights, on `device` and in the precision for this device."""
    torch.manual_seed(config.seed)
    precision = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if device == "cpu" else getattr(torch, config.model.precision))
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(precision)
