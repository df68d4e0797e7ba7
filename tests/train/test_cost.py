from __future__ import annotations

from typing import Any

import pytest
import torch
from parts import CHANNELS, FUSION, LANGUAGE, PLAIN, SIDE, TOKENS, VOCAB, WIDTH, small
from torch import nn

from onediff.config import Lora, Phase
from onediff.model.delta import Attention
from onediff.model.onediff import OneDiffForConditionalGeneration
from onediff.train.cost import Flops, find_gpu, peak_tflops, sizes
from onediff.train.engine import trainable

ALIGN = {"lr_vision": 0.0, "lr_delta": 1e-3, "lr_projector": 1e-3, "lr_language": 0.0}
TUNE = dict.fromkeys(ALIGN, 1e-3)
COUNTS = {"images": 11.0, "pairs": 5.0, "tokens": 257.0, "answer_tokens": 31.0}
PATCHES = SIDE * SIDE


def phase(**changes: Any) -> Phase:
    settings = {"mixture": {"scenes": 1.0}, "steps": 5, "epochs": None, "batch_size": 6, "lora": None, "warmup": 0.0,
                "clip_norm": 1.0, "mask_patches": 0.0, "validate_every": None, "num_val": 1, **PLAIN}
    return Phase(**(settings | TUNE | changes))


def multiplications(model: OneDiffForConditionalGeneration, part: str, run: Any) -> int:
    """Call `run` and count the multiplications in the layers whose names start with `part`, by forward hooks.

    A linear or convolution layer multiplies each weight once per output position. The key and value weights of an
    attention module with few queries are applied to the queries, so they count once per query.
    """
    total = 0

    def count(module: nn.Module, args: Any, out: torch.Tensor) -> None:
        nonlocal total
        positions = out.numel() // (out.shape[1] if isinstance(module, nn.Conv2d) else out.shape[-1])
        total += module.weight.numel() * positions  # type: ignore[operator,union-attr]

    def count_folded(module: Attention, args: Any, out: torch.Tensor) -> None:
        nonlocal total
        queries, context = args
        if module.has_few_queries(queries.shape[1], context.shape[1]):
            total += (module.key.weight.numel() + module.value.weight.numel()) * queries[..., 0].numel()

    handles = [module.register_forward_hook(count_folded if isinstance(module, Attention) else count)
               for name, module in model.named_modules()
               if isinstance(module, nn.Linear | nn.Conv2d | Attention) and name.startswith(part)]
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    return total


@pytest.mark.parametrize("inputs", ["pair", "pair_and_difference", "pair_and_matched_difference"])
def test_the_flops_of_a_pair_equal_the_multiplications_of_the_delta_module_and_projector(inputs: str) -> None:
    model = small(delta_inputs=inputs)
    before, after = torch.randn(2, 1, len(model.config.read_levels), PATCHES, CHANNELS)
    module = multiplications(model, "delta.", lambda: model.delta(before, after))
    projector = WIDTH * LANGUAGE + LANGUAGE * LANGUAGE
    flops = Flops.of(model, phase(), cached_tower=False)
    assert flops.pair == 6 * (module + projector * TOKENS)
    assert Flops.of(model, phase(**(ALIGN | {"lr_delta": 0.0})), cached_tower=False).pair == \
        2 * module + 6 * projector * TOKENS


def test_the_flops_of_a_pair_include_fusion() -> None:
    model = small(**FUSION)
    before, after = torch.randn(2, 1, len(model.config.read_levels), PATCHES, CHANNELS)
    fused = model.fusion(torch.randn(1, 2, 3, 12, 12), before, after)
    module = multiplications(model, "fusion.", lambda: model.fusion(torch.randn(1, 2, 3, 12, 12), before, after))
    delta = multiplications(model, "delta.", lambda: model.delta(before, after, fused.keys))
    projector = (WIDTH * LANGUAGE + LANGUAGE * LANGUAGE) * (TOKENS + fused.tokens.shape[1])
    assert Flops.of(model, phase(), cached_tower=False).pair == 6 * (module + delta + projector)


def test_the_flops_of_an_image_equal_the_multiplications_of_the_tower_and_projector() -> None:
    model = small()
    flops = Flops.of(model, phase(), cached_tower=False)
    assert flops.image == 6 * multiplications(model, "vision.", lambda: model.vision(torch.randn(1, 3, 12, 12)))
    assert flops.view == 6 * (CHANNELS * LANGUAGE + LANGUAGE * LANGUAGE) * PATCHES


def test_the_flops_of_a_pair_in_token_layout_b_include_the_enhance_module() -> None:
    model = small(reading="B")
    patches, delta = torch.randn(2, PATCHES, CHANNELS), torch.randn(1, TOKENS, WIDTH)
    enhance = multiplications(model, "enhance.", lambda: model.enhance_pairs(patches, delta, torch.tensor([0])))
    before, after = torch.randn(2, 1, len(model.config.read_levels), PATCHES, CHANNELS)
    module = multiplications(model, "delta.", lambda: model.delta(before, after))
    assert Flops.of(model, phase(), cached_tower=False).pair == 6 * (module + enhance)


def test_a_frozen_part_needs_fewer_flops_and_the_fewest_if_no_gradient_passes_through_it() -> None:
    model = small()
    blocks = sum(p.numel() for name, p in model.language.model.layers.named_parameters() if p.ndim == 2)
    trained, gradient_only, forward_only = (Flops.of(model, phase(**rates), cached_tower=False) for rates in (
        TUNE, ALIGN, {"lr_vision": 0.0, "lr_delta": 0.0, "lr_projector": 0.0}))
    assert (trained.token, gradient_only.token) == (6 * blocks, 4 * blocks)
    assert (trained.answer_token, gradient_only.answer_token) == (6 * VOCAB * LANGUAGE, 4 * VOCAB * LANGUAGE)
    assert trained.image == 3 * gradient_only.image and forward_only.view == trained.view / 3
    assert Flops.of(model, phase(**ALIGN), cached_tower=True).image == 0


def test_flops_include_lora_adapters_before_and_after_they_are_added() -> None:
    model, settings = small(), phase(lora=Lora(rank=3, alpha=6))
    blocks = sum(p.numel() for name, p in model.language.model.layers.named_parameters() if p.ndim == 2)
    flops_without_adapters = Flops.of(model, settings, cached_tower=False)
    trainable(model, settings)
    adapters = sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)
    assert flops_without_adapters == Flops.of(model, settings, cached_tower=False)
    assert flops_without_adapters.token == 4 * blocks + 6 * adapters
    assert sizes(model)["language"].learning == adapters


def test_in_token_layout_c_the_two_images_of_a_pair_are_projected_together() -> None:
    a, c = (Flops.of(small(reading=reading), phase(), cached_tower=True) for reading in ("A", "C"))
    assert a({**COUNTS, "pairs": 0}) < a(COUNTS)
    assert c(COUNTS) == c.view * 6 + c.pair * 5 + c.token * 257 + c.answer_token * 31
    assert a(COUNTS) == a.view * 11 + a.pair * 5 + a.token * 257 + a.answer_token * 31


def test_trainable_and_frozen_parameters_are_counted_separately() -> None:
    model = small()
    trainable(model, phase(**ALIGN))
    counts = sizes(model)
    assert counts["vision"].learning == counts["language"].learning == counts["delta"].frozen == 0
    assert sum(size.learning + size.frozen for size in counts.values()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("name", "tflops", "memory"), [
    ("NVIDIA H100 80GB HBM3", 989, 79.1), ("NVIDIA H100 PCIe", 756, 79.1), ("NVIDIA H200", 989, 139.8),
    ("h100", 989, 79.1), ("NVIDIA GH200 480GB", 989, 94.5), ("NVIDIA A100-SXM4-40GB", 312, 39.4),
    ("NVIDIA A100-SXM4-80GB", 312, 79.2), ("NVIDIA L40S", 362, 44.4), ("NVIDIA L4", 121, 22.0),
    ("NVIDIA A10", 125, 22.1), ("NVIDIA RTX A6000", 155, 47.4), ("NVIDIA GeForce RTX 4090", 165, 23.5),
    ("rtx4090", 165, 23.5), ("Tesla V100-SXM2-16GB", 125, 15.8)])
def test_a_gpu_is_found_by_its_driver_name_and_by_a_short_name(name: str, tflops: float, memory: float) -> None:
    gpu = find_gpu(name)
    assert gpu is not None and (gpu.tflops, gpu.memory_gib) == (tflops, memory)


@pytest.mark.parametrize("name", ["NVIDIA RTX A4000", "NVIDIA GeForce GTX 1080", "cpu"])
def test_an_unknown_gpu_has_no_peak_speed(name: str) -> None:
    assert peak_tflops(name) is None
