"""From params.yaml to a fresh OneDiff: pretrained tower and language model, all between them random.

Unless the delta module comes from BERT, or the whole from LLaVA, whose projector then comes along.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
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
from onediff.model.onediff import OneDiffForConditionalGeneration
from onediff.model.weights import check_placeholders, check_vocabulary, load_strictly

BESIDE_TOWER = ("text_model.", "text_projection.", "visual_projection.", "logit_", "classifier.", "pooler.", "head.")
BESIDE_BERT = ("cls.", "pooler.", "classifier.", "qa_outputs.")


def build(model: params.Model, *, seed: int) -> tuple[OneDiffForConditionalGeneration, OneDiffProcessor]:
    """Loads the backbones by name or path. Raises ValueError where they contradict params.yaml or each other."""
    configuration = configure(model)
    processor = OneDiffProcessor(
        load_image_processor(model.vision.path), AutoTokenizer.from_pretrained(model.language), template=model.template,
        tokens_per_image=configuration.tokens_per_image, delta_tokens=configuration.delta_tokens_read,
        images_joined=model.reading == "C", max_length=model.max_length)
    configuration.image_token_id, configuration.delta_token_id = processor.image_token_id, processor.delta_token_id
    llava = load_llava(model, processor)
    language = strip_language(llava) if llava else load_strictly(AutoModelForCausalLM, model.language,
                                                                 where="params.yaml: model.language")
    check_vocabulary(processor.tokenizer, language.get_input_embeddings().num_embeddings,
                     where=f"params.yaml: model.language: {model.language}")
    torch.manual_seed(seed)
    made = OneDiffForConditionalGeneration(configuration)
    made.adopt(tower=load_tower(model, llava), language=language)
    if llava:
        copy_projector(llava.model.multi_modal_projector, made.projector, reading=model.reading)
    if made.delta is not None and model.delta.init != "random":
        made.delta.copy_bert(load_strictly(BertModel, model.delta.init, where="params.yaml: model.delta.init",
                                           spare=BESIDE_BERT, add_pooling_layer=False))
    return made.to(getattr(torch, model.precision)), processor


def configure(model: params.Model) -> OneDiffConfig:
    for key, name in (("vision.path", model.vision.path), ("language", model.language)):
        check_source(key, name)
    vision, language = (AutoConfig.from_pretrained(name, trust_remote_code=False)
                        for name in (model.vision.path, model.language))
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


def check_source(key: str, name: str) -> None:
    """Raises FileNotFoundError for a folder that is not there; `owner/name` may be a model of the hub."""
    if name.count("/") != 1 and not Path(name, "config.json").exists():
        raise FileNotFoundError(f"params.yaml: model.{key}: {name} holds no model (no config.json); "
                                "'make backbones' makes those of the tiny preset")


def check_language(model: params.Model, vision: PreTrainedConfig, language: PreTrainedConfig) -> None:
    if not isinstance(language, LlavaConfig) and type(language) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"params.yaml: model.language must be a decoder or a LLaVA, but {model.language} is a "
                         f"'{language.model_type}'; name a Llama, Vicuna or Qwen, say")
    if isinstance(vision, LlavaConfig) and model.vision.path != model.language:
        raise ValueError(f"params.yaml: model.vision.path {model.vision.path} is a LLaVA, whose tower comes with its "
                         f"language model, but model.language is {model.language}; name the LLaVA in both, or a tower")


def check_vision(wanted: params.Vision, found: PreTrainedConfig) -> None:
    for key, value, actual in (("image_px", wanted.image_px, getattr(found, "image_size", None)),
                               ("patch_px", wanted.patch_px, getattr(found, "patch_size", None)),
                               ("layers", wanted.layers, found.num_hidden_layers)):
        if actual is None:
            raise ValueError(f"params.yaml: model.vision.path must be a CLIP or SigLIP tower, but {wanted.path} is a "
                             f"'{found.model_type}'; name a tower")
        if value != actual:
            raise ValueError(f"params.yaml: model.vision.{key} is {value}, but the tower at {wanted.path} has "
                             f"{actual}; write {actual}")


def check_llava(model: params.Model, vision: PreTrainedConfig, llava: LlavaConfig) -> None:
    """Raises ValueError if OneDiff would feed LLaVA's projector anything but what it was trained on."""
    where, layer, deepest = f"params.yaml: model.language: LLaVA {model.language}", llava.vision_feature_layer, \
        model.vision.layers + 1
    if not isinstance(layer, int):
        raise ValueError(f"{where} reads several levels of its tower, {layer}, OneDiff's language model one; take a "
                         "LLaVA with one vision_feature_layer")
    if layer % deepest != model.patch_level % deepest:
        raise ValueError(f"{where} reads level {layer} of its tower, but model.patch_level is {model.patch_level}; "
                         f"write {layer}")
    strategy = "full" if vision.model_type.startswith("siglip") else "default"  # SigLIP has no class token to drop
    for key, needed in (("vision_feature_select_strategy", strategy), ("projector_hidden_act", "gelu"),
                        ("multimodal_projector_bias", True)):
        if getattr(llava, key) != needed:
            raise ValueError(f"{where} has {key} {getattr(llava, key)!r}, but OneDiff's projector is LLaVA-1.5's, which "
                             f"with this tower means {needed!r}; take such a checkpoint")
    if vision.hidden_size != llava.vision_config.hidden_size:
        raise ValueError(f"params.yaml: model.vision.path: the tower {model.vision.path} is {vision.hidden_size} wide, "
                         f"but the projector of LLaVA {model.language} reads {llava.vision_config.hidden_size}; write "
                         f"{model.language}, or a tower of that width")


def load_llava(model: params.Model, processor: OneDiffProcessor) -> LlavaForConditionalGeneration | None:
    """None where model.language is a decoder. Raises ValueError if its `<image>` is not the tokenizer's."""
    where = f"params.yaml: model.language: {model.language}"
    found = AutoConfig.from_pretrained(model.language, trust_remote_code=False)
    is_llava = isinstance(found, LlavaConfig)
    check_placeholders(processor.tokenizer, where=where, saved={IMAGE: found.image_token_id} if is_llava else {})
    if not is_llava:
        return None
    llava = load_strictly(LlavaForConditionalGeneration, model.language, where="params.yaml: model.language")
    assert isinstance(llava, LlavaForConditionalGeneration), "from_pretrained gives its own class"
    return llava


def load_tower(model: params.Model, llava: LlavaForConditionalGeneration | None) -> nn.Module:
    if llava and model.vision.path == model.language:
        return vision_part(llava.model.vision_tower)
    return vision_part(load_strictly(AutoModel, model.vision.path, where="params.yaml: model.vision.path",
                                     spare=BESIDE_TOWER))


def vision_part(model: nn.Module) -> nn.Module:
    """The tower of a CLIP-class model, or the model itself where it is a tower."""
    return getattr(model, "vision_model", model)


def strip_language(llava: LlavaForConditionalGeneration) -> PreTrainedModel:
    """The decoder inside a LLaVA, with its head, as its own family's model: the same tensors, none of them copied."""
    with torch.device("meta"):
        language: Any = AutoModelForCausalLM.from_config(llava.config.text_config)
    setattr(language, language.base_model_prefix, llava.model.language_model)
    language.set_output_embeddings(llava.lm_head)
    language.generation_config = llava.generation_config
    left = [name for name, weight in language.named_parameters() if weight.is_meta]
    if left:
        raise ValueError(f"params.yaml: model.language: the LLaVA has no weights for {', '.join(left[:3])} of a "
                         f"{type(language).__name__}; take a LLaVA of the Llama or Qwen kind")
    return language


@torch.no_grad()
def copy_projector(llava: nn.Module, ours: nn.Sequential, *, reading: str) -> None:
    """LLaVA's projector into ours, so that step 0 gives LLaVA's tokens: B reads [patch; enhanced] and starts blind to
    the latter, C reads [before; after] and starts with the mean of both.
    """
    first = llava.linear_1.weight
    weight = {"A": [first], "B": [first, torch.zeros_like(first)], "C": [first / 2, first / 2]}[reading]
    ours[0].weight.copy_(torch.cat(weight, dim=1))
    ours[0].bias.copy_(llava.linear_1.bias)
    ours[2].load_state_dict(llava.linear_2.state_dict())
