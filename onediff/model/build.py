"""From params.yaml to a fresh OneDiff: pretrained tower and language model, all between them random (or from BERT)."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, BertModel, PreTrainedConfig

from onediff import config as params
from onediff.inputs.processing import OneDiffProcessor, load_image_processor
from onediff.model.configuration import OneDiffConfig
from onediff.model.onediff import OneDiffForConditionalGeneration


def build(model: params.Model, *, seed: int) -> tuple[OneDiffForConditionalGeneration, OneDiffProcessor]:
    """Loads the backbones by name or path. Raises ValueError where they contradict params.yaml."""
    configuration = configure(model)
    processor = OneDiffProcessor(
        load_image_processor(model.vision.path), AutoTokenizer.from_pretrained(model.language), template=model.template,
        tokens_per_image=configuration.tokens_per_image, delta_tokens=configuration.delta_tokens_read,
        max_length=model.max_length)
    configuration.image_token_id, configuration.delta_token_id = processor.image_token_id, processor.delta_token_id
    torch.manual_seed(seed)
    made = OneDiffForConditionalGeneration(configuration)
    made.vision.tower = vision_part(AutoModel.from_pretrained(model.vision.path))
    made.language = AutoModelForCausalLM.from_pretrained(model.language)
    if model.delta.init != "random":
        made.delta.copy_bert(BertModel.from_pretrained(model.delta.init))
    made.generation_config = made.language.generation_config
    return made.to(getattr(torch, model.precision)), processor


def configure(model: params.Model) -> OneDiffConfig:
    for key, name in (("vision.path", model.vision.path), ("language", model.language)):
        check_source(key, name)
    vision, language = AutoConfig.from_pretrained(model.vision.path), AutoConfig.from_pretrained(model.language)
    vision = getattr(vision, "vision_config", vision)  # a whole CLIP or SigLIP names its tower so
    check_vision(model.vision, vision)
    return OneDiffConfig(
        vision_config=vision, text_config=language, reading=model.reading, patch_level=model.patch_level,
        patch_pool=model.patch_pool, delta_num_tokens=model.delta.num_tokens, delta_width=model.delta.width,
        delta_heads=model.delta.heads, delta_levels=list(model.delta.levels),
        delta_cross_attention_every=model.delta.cross_attention_every, delta_inputs=model.delta.inputs,
        template=model.template)


def check_source(key: str, name: str) -> None:
    """Raises FileNotFoundError for a folder that is not there; `owner/name` may be a model of the hub."""
    if name.count("/") != 1 and not Path(name, "config.json").exists():
        raise FileNotFoundError(f"params.yaml: model.{key}: {name} holds no model (no config.json); "
                                "'make backbones' makes those of the tiny preset")


def check_vision(wanted: params.Vision, found: PreTrainedConfig) -> None:
    for key, value, actual in (("image_px", wanted.image_px, found.image_size),
                               ("patch_px", wanted.patch_px, found.patch_size),
                               ("layers", wanted.layers, found.num_hidden_layers)):
        if value != actual:
            raise ValueError(f"params.yaml: model.vision.{key} is {value}, but the tower at {wanted.path} has "
                             f"{actual}; write {actual}")


def vision_part(model: torch.nn.Module) -> torch.nn.Module:
    """The tower of a CLIP-class model, or the model itself where it is a tower."""
    return getattr(model, "vision_model", model)
