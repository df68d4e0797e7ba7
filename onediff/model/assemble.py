"""Builds an untrained OneDiff from params.yaml: a pretrained tower and language model with random modules in between.

The delta module may start from BERT. From a LLaVA come tower, language model and projector.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
)

from onediff import config as params
from onediff.inputs.processing import OneDiffProcessor, load_image_processor
from onediff.inputs.prompt import IMAGE
from onediff.model.configuration import OneDiffConfig
from onediff.model.onediff import OneDiffForConditionalGeneration, Projector
from onediff.model.weights import check_placeholders, check_vocabulary, load_strictly, read_config

VISION, LANGUAGE = "params.yaml: model.vision.path", "params.yaml: model.language"
BESIDE_TOWER = ("text_model.", "text_projection.", "visual_projection.", "logit_", "classifier.", "pooler.", "head.")
BESIDE_BERT = ("cls.", "pooler.", "classifier.", "qa_outputs.")


def build(model: params.Model, *, seed: int) -> tuple[OneDiffForConditionalGeneration, OneDiffProcessor]:
    """Loads the backbones by name or path. Raises ValueError where they contradict params.yaml or each other."""
    configuration = configure(model)
    processor = OneDiffProcessor(
        load_image_processor(model.vision.path), AutoTokenizer.from_pretrained(model.language, trust_remote_code=False),
        template=model.template, tokens_per_image=configuration.tokens_per_image,
        delta_tokens=configuration.delta_tokens_read, images_joined=model.reading == "C", max_length=model.max_length)
    configuration.image_token_id, configuration.delta_token_id = processor.image_token_id, processor.delta_token_id
    llava_config = read_config(model.language, where=LANGUAGE)
    is_llava, where = isinstance(llava_config, LlavaConfig), f"{LANGUAGE}: {model.language}"
    check_vocabulary(processor.tokenizer, configuration.text_config.vocab_size, where=where)
    check_placeholders(processor.tokenizer, where=where, saved={IMAGE: llava_config.image_token_id} if is_llava else {})
    llava = load_strictly(LlavaForConditionalGeneration, model.language, where=LANGUAGE) if is_llava else None
    language = decoder_of(llava) if llava else load_strictly(AutoModelForCausalLM, model.language, where=LANGUAGE)
    tower = (llava.model.vision_tower if llava and model.vision.path == model.language else
             load_strictly(AutoModel, model.vision.path, where=VISION, ignored=BESIDE_TOWER))
    torch.manual_seed(seed)
    onediff = OneDiffForConditionalGeneration(configuration, pretrained=language)
    onediff.vision.tower = getattr(tower, "vision_model", tower)  # a CLIP-class model has its tower under this name
    onediff.generation_config = language.generation_config
    if llava:
        copy_projector(llava, onediff.projector, reading=model.reading)
    if onediff.delta is not None and model.delta.init != "random":
        onediff.delta.copy_bert(load_strictly(BertModel, model.delta.init, where="params.yaml: model.delta.init",
                                              ignored=BESIDE_BERT, add_pooling_layer=False))
    return onediff.to(getattr(torch, model.precision)), processor


def configure(model: params.Model) -> OneDiffConfig:
    """Raises FileNotFoundError for a folder without a model, and ValueError for models that do not fit each other."""
    for key, name in (("vision.path", model.vision.path), ("language", model.language)):
        if name.count("/") != 1 and not Path(name, "config.json").exists():  # `owner/name` may be a model of the hub
            raise FileNotFoundError(f"params.yaml: model.{key}: {name} holds no model (no config.json); "
                                    "'make backbones' makes those of the tiny preset")
    vision, language = read_config(model.vision.path, where=VISION), read_config(model.language, where=LANGUAGE)
    check_language(model, vision, language)
    vision = getattr(vision, "vision_config", vision)  # a whole CLIP, SigLIP or LLaVA names its tower so
    check_vision(model.vision, vision)
    if isinstance(language, LlavaConfig):
        check_llava(model, vision, language)
        language = language.text_config
    return OneDiffConfig(
        vision_config=vision, text_config=language, reading=model.reading, patch_level=model.patch_level,
        patch_pool=model.patch_pool, delta_num_tokens=model.delta.num_tokens, delta_width=model.delta.width,
        delta_heads=model.delta.heads, delta_levels=list(model.delta.levels),
        delta_cross_attention_every=model.delta.cross_attention_every, delta_inputs=model.delta.inputs,
        delta_image_ids=model.delta.image_ids, template=model.template)


def check_language(model: params.Model, vision: PreTrainedConfig, language: PreTrainedConfig) -> None:
    if not isinstance(language, LlavaConfig) and type(language) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"{LANGUAGE} must be a decoder or a LLaVA, but {model.language} is a "
                         f"'{language.model_type}'; name a Llama, Vicuna or Qwen, say")
    if isinstance(vision, LlavaConfig) and model.vision.path != model.language:
        raise ValueError(f"{VISION} {model.vision.path} is a LLaVA, whose tower comes with its "
                         f"language model, but model.language is {model.language}; name the LLaVA in both, or a tower")


def check_vision(vision: params.Vision, tower: PreTrainedConfig) -> None:
    for key, value, actual in (("image_px", vision.image_px, getattr(tower, "image_size", None)),
                               ("patch_px", vision.patch_px, getattr(tower, "patch_size", None)),
                               ("layers", vision.layers, tower.num_hidden_layers)):
        if actual is None:
            raise ValueError(f"{VISION} must be a CLIP or SigLIP tower, but {vision.path} is a "
                             f"'{tower.model_type}'; name a tower")
        if value != actual:
            raise ValueError(f"params.yaml: model.vision.{key} is {value}, but the tower at {vision.path} has "
                             f"{actual}; write {actual}")


def check_llava(model: params.Model, vision: PreTrainedConfig, llava: LlavaConfig) -> None:
    """Raises ValueError if OneDiff would feed LLaVA's projector anything but what it was trained on."""
    where, layer = f"{LANGUAGE}: LLaVA {model.language}", llava.vision_feature_layer
    if not isinstance(layer, int):
        raise ValueError(f"{where} reads several levels of its tower, {layer}, OneDiff's language model one; take a "
                         "LLaVA with one vision_feature_layer")
    if (layer - model.patch_level) % (model.vision.layers + 1):  # -2 of 24 layers is 23 of the states 0 to 24
        raise ValueError(f"{where} reads level {layer} of its tower, but model.patch_level is {model.patch_level}; "
                         f"write {layer}")
    strategy = "full" if vision.model_type.startswith("siglip") else "default"  # SigLIP has no class token to drop
    for key, needed in (("vision_feature_select_strategy", strategy), ("projector_hidden_act", "gelu"),
                        ("multimodal_projector_bias", True)):
        if getattr(llava, key) != needed:
            raise ValueError(f"{where} has {key} {getattr(llava, key)!r}, but OneDiff reads patches alone and projects "
                             f"them as LLaVA-1.5 does, with this tower {key} {needed!r}; take such a checkpoint")
    if vision.hidden_size != llava.vision_config.hidden_size:
        raise ValueError(f"{VISION}: the tower {model.vision.path} is {vision.hidden_size} wide, but the projector of "
                         f"LLaVA {model.language} reads {llava.vision_config.hidden_size}; write {model.language}, or "
                         "a tower of that width")


def decoder_of(llava: LlavaForConditionalGeneration) -> PreTrainedModel:
    """The language model inside a LLaVA, with its head, as its own family's class: the same tensors, none copied."""
    with torch.device("meta"):
        language: Any = AutoModelForCausalLM.from_config(llava.config.text_config)
    setattr(language, language.base_model_prefix, llava.model.language_model)
    language.set_output_embeddings(llava.lm_head)
    language.generation_config = llava.generation_config
    missing = [name for name, weight in language.named_parameters() if weight.is_meta]
    if missing:
        raise ValueError(f"{LANGUAGE}: the LLaVA has no weights for {', '.join(missing[:3])} of a "
                         f"{type(language).__name__}; take a LLaVA of the Llama or Qwen kind")
    return language


@torch.no_grad()
def copy_projector(llava: LlavaForConditionalGeneration, ours: Projector, *, reading: str) -> None:
    """LLaVA's projector into ours, so that step 0 gives LLaVA's tokens: B reads [patch; enhanced] and starts blind to
    the latter, C reads [before; after] and starts with the mean of both.
    """
    theirs = llava.model.multi_modal_projector.state_dict()
    first = theirs["linear_1.weight"]
    parts = {"A": [first], "B": [first, torch.zeros_like(first)], "C": [first / 2, first / 2]}[reading]
    ours.load_state_dict({"0.weight": torch.cat(parts, dim=1), "0.bias": theirs["linear_1.bias"],
                          "2.weight": theirs["linear_2.weight"], "2.bias": theirs["linear_2.bias"]})
