"""Build a OneDiff model before training, from the pretrained models that the section `model` of params.yaml names.

The vision tower and the language model are pretrained, and the modules between them start with random weights, with
two exceptions: the delta module may start from BERT, and a LLaVA checkpoint also provides the projector.
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
from onediff.inputs.attributes import CLASSES, words_of
from onediff.inputs.processing import OneDiffProcessor, load_image_processor
from onediff.inputs.prompt import IMAGE
from onediff.model.configuration import OneDiffConfig
from onediff.model.exactness import row_logits
from onediff.model.onediff import OneDiffForConditionalGeneration, Projector
from onediff.model.weights import check_placeholders, check_vocabulary, load_strictly, read_config

VISION, LANGUAGE = "params.yaml: model.vision.path", "params.yaml: model.language"
# `build` ignores weights with these prefixes, because they do not belong to the vision tower or the BERT encoder.
BESIDE_TOWER = ("text_model.", "text_projection.", "visual_projection.", "logit_", "classifier.", "pooler.", "head.")
BESIDE_BERT = ("cls.", "pooler.", "classifier.", "qa_outputs.")


def build(model: params.Model, *, seed: int) -> tuple[OneDiffForConditionalGeneration, OneDiffProcessor]:
    """Load the pretrained models and return the OneDiff model that is ready for training, and its processor.

    `seed` determines the random weights of the modules that have no pretrained weights. Raises ValueError if the
    pretrained models contradict params.yaml or do not fit together.
    """
    configuration = configure(model)
    processor = OneDiffProcessor(
        load_image_processor(model.vision.path), AutoTokenizer.from_pretrained(model.language, trust_remote_code=False),
        template=model.template, tokens_per_image=configuration.tokens_per_image,
        delta_tokens=configuration.delta_tokens_read, images_joined=model.reading == "C", max_length=model.max_length)
    configuration.delta_classes = {
        name: {option: processor.tokenizer(words_of(option), add_special_tokens=False).input_ids
               for option in options} for name, options in configuration.delta_classes.items()}
    configuration.image_token_id, configuration.delta_token_id = processor.image_token_id, processor.delta_token_id
    llava_config = read_config(model.language, where=LANGUAGE)
    is_llava, where = isinstance(llava_config, LlavaConfig), f"{LANGUAGE}: {model.language}"
    check_vocabulary(processor.tokenizer, configuration.text_config.vocab_size, where=where)
    check_placeholders(processor.tokenizer, where=where, saved={IMAGE: llava_config.image_token_id} if is_llava else {})
    loaded = load_strictly(LlavaForConditionalGeneration if is_llava else AutoModelForCausalLM, model.language,
                           where=LANGUAGE)
    llava = loaded if is_llava else None
    # For some vision-language models, transformers loads the complete model, and for others only the text part.
    language = loaded if type(loaded.config) is type(configuration.text_config) else decoder_of(loaded)
    tower = (llava.model.vision_tower if llava and model.vision.path == model.language else
             load_strictly(AutoModel, model.vision.path, where=VISION, ignored=BESIDE_TOWER))
    torch.manual_seed(seed)
    onediff = OneDiffForConditionalGeneration(configuration, pretrained=language)
    # A complete CLIPModel has its vision tower in the attribute `vision_model`.
    onediff.vision.tower = getattr(tower, "vision_model", tower)
    onediff.generation_config = language.generation_config
    if llava:
        copy_projector(llava, onediff.projector, reading=model.reading)
    if onediff.delta is not None and model.delta.init != "random":
        onediff.delta.copy_bert(load_strictly(BertModel, model.delta.init, where="params.yaml: model.delta.init",
                                              ignored=BESIDE_BERT, add_pooling_layer=False))
    return onediff.to(getattr(torch, model.precision)), processor


def configure(model: params.Model) -> OneDiffConfig:
    """Return the configuration of the model that `build` returns, without loading weights.

    The words of the attributes are missing: each class has token 0, because the tokenizer is not loaded.

    Raises FileNotFoundError if a path in params.yaml contains no model, and ValueError if the pretrained models
    contradict params.yaml or do not fit together.
    """
    for key, name in (("vision.path", model.vision.path), ("language", model.language)):
        # A name with one slash, `owner/name`, may be a model on the Hugging Face Hub, so it needs no local folder.
        if name.count("/") != 1 and not Path(name, "config.json").exists():
            raise FileNotFoundError(f"params.yaml: model.{key}: {name} must be a folder with a config.json, or "
                                    "a model of the Hugging Face Hub, but it does not exist; correct the path, or run "
                                    "'make backbones' to train the backbones of the tiny preset")
    vision, language = read_config(model.vision.path, where=VISION), read_config(model.language, where=LANGUAGE)
    check_language(model, vision, language)
    # The config of a complete CLIP, SigLIP or LLaVA model contains the config of the vision tower.
    vision = getattr(vision, "vision_config", vision)
    check_vision(model.vision, vision)
    if isinstance(language, LlavaConfig):
        check_llava(model, vision, language)
    text = text_part(language)
    row_logits(text)  # Raises ValueError if the language model is no decoder.
    return OneDiffConfig(
        vision_config=vision, text_config=text, reading=model.reading, patch_level=model.patch_level,
        patch_pool=model.patch_pool, delta_num_tokens=model.delta.num_tokens, delta_width=model.delta.width,
        delta_heads=model.delta.heads, delta_levels=list(model.delta.levels),
        delta_cross_attention_every=model.delta.cross_attention_every, delta_inputs=model.delta.inputs,
        delta_image_ids=model.delta.image_ids,
        delta_fusion=model.delta.fusion.model_dump() if model.delta.fusion else None,
        delta_classes={name: {option: [0] for option in options}
                       for name, options in CLASSES.items()} if model.delta.fusion else {},
        template=model.template)


def text_part(language: PreTrainedConfig) -> PreTrainedConfig:
    """Return the configuration of the decoder: a part of the configuration if it is that of a vision-language model."""
    return getattr(language, "text_config", language)


def check_language(model: params.Model, vision: PreTrainedConfig, language: PreTrainedConfig) -> None:
    """Raise ValueError unless the language model is or contains a decoder that can be used without its other parts."""
    text = text_part(language)
    if not isinstance(language, LlavaConfig) and (
            type(language) not in MODEL_FOR_CAUSAL_LM_MAPPING or type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING
            or not hasattr(text, "vocab_size")):
        raise ValueError(f"{LANGUAGE} must be a decoder-only language model, a LLaVA, or another vision-language model "
                         f"whose text part is such a decoder, but {model.language} is a '{language.model_type}'; use "
                         "for example a Llama, Vicuna or Qwen model")
    if isinstance(vision, LlavaConfig) and model.vision.path != model.language:
        raise ValueError(f"{VISION}: the vision tower of LLaVA {model.vision.path} can only be used together with the "
                         f"language model of this LLaVA, but model.language is {model.language}; set both keys to the "
                         "LLaVA, or set model.vision.path to a CLIP or SigLIP model")


def check_vision(vision: params.Vision, tower: PreTrainedConfig) -> None:
    """Raise ValueError if image size, patch size or number of layers of the vision tower differ from params.yaml."""
    for key, value, actual in (("image_px", vision.image_px, getattr(tower, "image_size", None)),
                               ("patch_px", vision.patch_px, getattr(tower, "patch_size", None)),
                               ("layers", vision.layers, tower.num_hidden_layers)):
        if actual is None:
            raise ValueError(f"{VISION} must be a CLIP or SigLIP vision tower, but {vision.path} is a "
                             f"'{tower.model_type}'; use a CLIP or SigLIP model")
        if value != actual:
            raise ValueError(f"params.yaml: model.vision.{key} must be {actual}, as in the config.json of the vision "
                             f"tower {vision.path}, got {value}; set it to {actual}")


def check_llava(model: params.Model, vision: PreTrainedConfig, llava: LlavaConfig) -> None:
    """Raise ValueError if LLaVA's projector has another form than OneDiff's, or was trained on other features."""
    where, layer = f"{LANGUAGE}: LLaVA {model.language}", llava.vision_feature_layer
    if not isinstance(layer, int):
        raise ValueError(f"{where} must use the output of one layer of its vision tower, but its config.json sets "
                         f"vision_feature_layer to {layer}; use a LLaVA with a single vision_feature_layer")
    # Levels may be negative: a vision tower of 24 layers has the levels 0 to 24, and -2 means level 23.
    if (layer - model.patch_level) % (model.vision.layers + 1):
        raise ValueError(f"{where} was trained on level {layer} of its vision tower, but model.patch_level is "
                         f"{model.patch_level}; set model.patch_level to {layer}")
    strategy = "full" if vision.model_type.startswith("siglip") else "default"  # SigLIP has no class token
    for key, needed in (("vision_feature_select_strategy", strategy), ("projector_hidden_act", "gelu"),
                        ("multimodal_projector_bias", True)):
        if getattr(llava, key) != needed:
            raise ValueError(f"{where} must have {key} {needed!r}, because OneDiff projects the patches of this tower "
                             f"as LLaVA-1.5 does, got {getattr(llava, key)!r}; use a checkpoint with that value")
    if vision.hidden_size != llava.vision_config.hidden_size:
        raise ValueError(f"{VISION}: the vision tower must have width {llava.vision_config.hidden_size}, because the "
                         f"projector of LLaVA {model.language} reads this width, but {model.vision.path} has width "
                         f"{vision.hidden_size}; set model.vision.path to {model.language}, or to a vision tower of "
                         f"width {llava.vision_config.hidden_size}")


def decoder_of(whole: PreTrainedModel) -> PreTrainedModel:
    """Return the language model inside a vision-language model as a causal language model, such as a LlamaForCausalLM.

    The result shares all tensors with the complete model, so no weights are copied. Raises ValueError if the complete
    model lacks some weights of the language model, or does not keep them in one module.
    """
    with torch.device("meta"):
        language: Any = AutoModelForCausalLM.from_config(whole.config.text_config)
    decoder = getattr(whole.base_model, "language_model", None)
    if decoder is not None:
        setattr(language, language.base_model_prefix, decoder)
        language.set_output_embeddings(whole.get_output_embeddings())
    language.generation_config = whole.generation_config
    missing = [name for name, weight in language.named_parameters() if weight.is_meta]
    if missing:
        raise ValueError(f"{LANGUAGE}: the {type(whole).__name__} must contain all weights of a "
                         f"{type(language).__name__}, but {', '.join(missing[:3])} are missing; use a model of the "
                         "Llama or Qwen family")
    return language


@torch.no_grad()
def copy_projector(llava: LlavaForConditionalGeneration, target: Projector, *, reading: str) -> None:
    """Copy the weights of LLaVA's projector to OneDiff's projector, so that training starts with LLaVA's patch tokens.

    In the token layouts B and C, the first layer of OneDiff's projector has twice as many inputs as LLaVA's. B reads
    [patch; enhanced patch]: the weights for the enhanced patch start at 0. C reads [before patch; after patch]: the
    weights for both patches are LLaVA's weights divided by 2, so the projector reads the mean of both patches. The
    weights for the map of Fusion, which C reads too, start at 0.
    """
    state = llava.model.multi_modal_projector.state_dict()
    first = state["linear_1.weight"]
    parts = {"A": [first], "B": [first, torch.zeros_like(first)], "C": [first / 2, first / 2]}[reading]
    fused = first.new_zeros(len(first), target.state_dict()["0.weight"].shape[1] - sum(part.shape[1] for part in parts))
    target.load_state_dict({"0.weight": torch.cat([*parts, fused], dim=1), "0.bias": state["linear_1.bias"],
                            "2.weight": state["linear_2.weight"], "2.bias": state["linear_2.bias"]})
