"""Small random vision-language chat models, saved with the file names and chat templates of the Hugging Face Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

FIRST_MARK = 258  # The id of the first special token. Smaller ids are <s>, </s> and the 256 bytes.
TEXT: dict[str, Any] = {"vocab_size": 310, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 2048,
                        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
LLAVA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}{% for content in "
    "message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{% generation %}"
    "{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}"
    "{{ 'ASSISTANT:' }}{% endif %}")
QWEN_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% for message in messages %}{% if loop.first and message['role'] != "
    "'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>"
    "{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' or 'image' in content or 'image_url' in "
    "content %}{% set image_count.value = image_count.value + 1 %}{% if add_vision_id %}Picture {{ image_count.value }}"
    ": {% endif %}<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}"
    "{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% endif %}")
IDEFICS_TEMPLATE = (
    "<s>{% for message in messages %}{{message['role'].capitalize()}}{% if message['content'][0]['type'] == 'image' %}"
    "{{':'}}{% else %}{{': '}}{% endif %}{% for line in message['content'] %}{% if line['type'] == 'text' %}"
    "{{line['text']}}{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}")


def llava(folder: Path) -> str:
    """Save a small model in the format of llava-hf/llava-1.5-7b-hf, for images of 28 pixels; return the folder."""
    vision = CLIPVisionConfig(hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
                              image_size=28, patch_size=7)
    _save(LlavaForConditionalGeneration(LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**TEXT), image_token_index=FIRST_MARK, image_seq_length=16)),
        folder)
    _save_tokenizer(folder, ["<image>", "<pad>"], bos_token="<s>", pad_token="<pad>")
    side = {"height": 28, "width": 28}
    _write(folder, "preprocessor_config.json", {
        "crop_size": side, "do_center_crop": True, "do_convert_rgb": True, "do_normalize": True, "do_rescale": True,
        "do_resize": True, "image_mean": CLIP_MEAN, "image_std": CLIP_STD, "resample": 3,
        "image_processor_type": "CLIPImageProcessor", "processor_class": "LlavaProcessor",
        "rescale_factor": 1 / 255, "size": {"shortest_edge": 28}})
    _write(folder, "processor_config.json", {
        "image_token": "<image>", "num_additional_image_tokens": 1, "patch_size": 7,
        "processor_class": "LlavaProcessor", "vision_feature_select_strategy": "default"})
    _write(folder, "chat_template.json", {"chat_template": LLAVA_TEMPLATE})
    return str(folder)


def qwen2_vl(folder: Path) -> str:
    """Save a small model in the format of Qwen/Qwen2-VL-7B-Instruct, which does not resize images to one size.

    The generation config recommends sampling, so that a test can check that greedy search is used in spite of it.
    """
    marks = _qwen_files(folder)
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(
        text_config=TEXT | {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}},
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2,
                       "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}, **marks))
    model.generation_config.update(do_sample=True, temperature=2.0, top_k=40, repetition_penalty=1.3)
    _save(model, folder)
    return str(folder)


def qwen2_5_vl(folder: Path) -> str:
    """Save a small model in the format of Qwen/Qwen2.5-VL-7B-Instruct, with the video file of new transformers."""
    marks = _qwen_files(folder)
    _write(folder, "video_preprocessor_config.json", {
        "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2, "video_processor_type": "Qwen2VLVideoProcessor",
        "processor_class": "Qwen2_5_VLProcessor"})
    _save(Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(
        text_config=TEXT | {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}},
        vision_config={"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32,
                       "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 56,
                       "fullatt_block_indexes": [1]}, **marks)), folder)
    return str(folder)


def idefics3(folder: Path) -> str:
    """Save a small Idefics3 model in the format of HuggingFaceTB/SmolVLM-Instruct, which divides images into tiles."""
    rows = [f"<row_{i + 1}_col_{j + 1}>" for i in range(6) for j in range(6)]
    marks = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *rows]
    _save_tokenizer(folder, marks, bos_token="<s>", pad_token="</s>")
    _save(Idefics3ForConditionalGeneration(Idefics3Config(
        image_token_id=FIRST_MARK + 1, scale_factor=2, text_config=LlamaConfig(**TEXT).to_dict(),
        vision_config={"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                       "image_size": 28, "patch_size": 7})), folder)
    _write(folder, "preprocessor_config.json", {
        "do_convert_rgb": True, "do_image_splitting": True, "do_normalize": True, "do_pad": True, "do_rescale": True,
        "do_resize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 1, "rescale_factor": 1 / 255,
        "image_processor_type": "Idefics3ImageProcessor", "processor_class": "Idefics3Processor",
        "max_image_size": {"longest_edge": 28}, "size": {"longest_edge": 56}})
    _write(folder, "processor_config.json", {"image_seq_len": 4, "processor_class": "Idefics3Processor"})
    _write(folder, "chat_template.json", {"chat_template": IDEFICS_TEMPLATE})
    return str(folder)


MAKERS = {"llava": llava, "qwen2_vl": qwen2_vl, "qwen2_5_vl": qwen2_5_vl, "idefics3": idefics3}


def _qwen_files(folder: Path) -> dict[str, int]:
    """Save tokenizer, image processor and chat template of Qwen2-VL, and return the ids of the vision tokens."""
    marks = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<|im_start|>", "<|im_end|>"]
    _save_tokenizer(folder, marks, pad_token="</s>")
    _write(folder, "preprocessor_config.json", {
        "min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
        "image_mean": CLIP_MEAN, "image_std": CLIP_STD, "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor"})
    _write(folder, "chat_template.json", {"chat_template": QWEN_TEMPLATE})
    return {"vision_start_token_id": FIRST_MARK, "vision_end_token_id": FIRST_MARK + 1,
            "image_token_id": FIRST_MARK + 2, "video_token_id": FIRST_MARK + 3}


def _save(model: Any, folder: Path) -> None:
    """Save a model with large random weights, because all models with the small default weights answer alike."""
    torch.manual_seed(1)
    for weight in model.parameters():
        if weight.dim() > 1:
            nn.init.normal_(weight, std=0.3)
    model.save_pretrained(folder)


def _save_tokenizer(folder: Path, marks: list[str], **roles: str) -> None:
    """Save a tokenizer whose tokens are <s>, </s>, the 256 bytes and the special tokens `marks`.

    If `roles` contains `bos_token`, the tokenizer puts <s> before every text, like the tokenizer of Llama.
    """
    letters = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]  # alphabet() has a random order.
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(marks)
    if "bos_token" in roles:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", **roles).save_pretrained(folder)


def _write(folder: Path, name: str, values: dict[str, Any]) -> None:
    (folder / name).write_text(json.dumps(values), encoding="utf-8")
