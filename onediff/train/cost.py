"""The cost of training: parameter counts, floating-point operations (FLOPs), and the peak speed of known GPUs.

Nothing here runs a model. FLOPs follow the usual convention: per token, 6 FLOPs for each weight of a trainable part,
4 for each weight of a frozen part that the gradient passes through, and 2 for a part that only runs forward.
Attention scores, norms, embedding tables and recomputed activations are not counted.
Shapes:  N patches per image, K delta tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from onediff.config import Phase
from onediff.model.configuration import OneDiffConfig
from onediff.model.delta import Attention, DeltaLayer
from onediff.model.fusion import Fusion
from onediff.model.onediff import PARTS, OneDiffForConditionalGeneration
from onediff.train.engine import learning_rates

LEARNS, PASSED_THROUGH, FORWARD = 6.0, 4.0, 2.0


@dataclass(frozen=True)
class Gpu:
    """A type of GPU, with the memory in GiB that torch reports, and the peak TFLOP/s for dense matrix products.

    The peak is for bfloat16, or for float16 on GPUs without bfloat16.
    """

    name: str
    memory_gib: float
    tflops: float
    bfloat16: bool = True


# Peaks are from the vendors' data sheets, without sparsity. The first entry whose name matches the device is used.
GPUS = (
    Gpu("GB200", 184.0, 2500), Gpu("B200", 178.0, 2250), Gpu("GH200", 94.5, 989), Gpu("H200", 139.8, 989),
    Gpu("H100 PCIe", 79.1, 756), Gpu("H100 NVL", 93.1, 835), Gpu("H100", 79.1, 989), Gpu("H800", 79.1, 989),
    Gpu("H20", 95.0, 148), Gpu("A100-SXM4-40GB", 39.4, 312), Gpu("A100-PCIE-40GB", 39.4, 312),
    Gpu("A100-40GB", 39.4, 312), Gpu("A100", 79.2, 312), Gpu("A800", 79.2, 312), Gpu("A6000", 47.4, 155),
    Gpu("6000 Ada", 47.4, 364), Gpu("A40", 44.4, 150), Gpu("A30", 23.5, 165), Gpu("A10G", 22.1, 70),
    Gpu("A10", 22.1, 125), Gpu("L40S", 44.4, 362), Gpu("L40", 44.4, 181), Gpu("L4", 22.0, 121),
    Gpu("RTX 5090", 31.4, 210), Gpu("RTX 4090", 23.5, 165), Gpu("RTX 3090", 23.6, 71), Gpu("MI300X", 191.5, 1307),
    Gpu("V100-SXM2-16GB", 15.8, 125, bfloat16=False), Gpu("V100", 31.7, 125, bfloat16=False),
    Gpu("T4", 14.6, 65, bfloat16=False),
)


def find_gpu(name: str) -> Gpu | None:
    """Find a type of GPU by the driver's name (`NVIDIA H100 80GB HBM3`) or a short name (`h100`); None if unknown."""
    for gpu in GPUS:
        words = r"[ -]?".join(re.split("[ -]", gpu.name))
        # No digit may follow the name, so that an A4000 is not taken for an A40.
        if re.search(rf"{words}(?!\d)", name, re.IGNORECASE):
            return gpu
    return None


def peak_tflops(device_name: str) -> float | None:
    gpu = find_gpu(device_name)
    return gpu.tflops if gpu else None


@dataclass(frozen=True)
class Size:
    """The number of trainable and of frozen parameters of one part of the model."""

    learning: int
    frozen: int


def sizes(model: OneDiffForConditionalGeneration) -> dict[str, Size]:
    """Count the parameters of each part of the model, after `engine.trainable` has frozen some of them.

    The model may be on the meta device, because only shapes are read.
    """
    counts = {part: [0, 0] for part in PARTS}
    for name, parameter in model.named_parameters():
        counts[model.part_of(name)][not parameter.requires_grad] += parameter.numel()
    return {part: Size(*count) for part, count in counts.items()}


@dataclass(frozen=True)
class Flops:
    """The FLOPs of training for each image, pair, token and answer token of a batch.

    `image` is the cost of the vision tower. `view` is the cost of the patch projector, which runs once per image or, in
    token layout C, once per pair. `answer_token` is the cost of the output layer, which computes logits only for answer
    tokens.
    """

    image: float
    view: float
    pair: float
    token: float
    answer_token: float
    views_joined: bool

    @classmethod
    def of(cls, model: OneDiffForConditionalGeneration, phase: Phase, *, cached_tower: bool) -> Flops:
        """Compute the FLOPs of `model` when it is trained with the settings of `phase`.

        `cached_tower` means that the features of the vision tower were computed before training. The model may be on
        the meta device.
        """
        rates, config = learning_rates(phase), model.config
        blocks = [module for name, module in model.language.get_decoder().named_modules()
                  if isinstance(module, nn.Linear) and "lora_" not in name]
        adapters = phase.lora.rank * sum(m.in_features + m.out_features for m in blocks) if phase.lora else 0
        tower = _factor(rates, "vision") * _tower_products(model.vision.tower, config.num_patches)
        # Gradients pass through the projector of the delta tokens if the vision tower or the delta module is trainable.
        after_delta = LEARNS if rates["projector"] else PASSED_THROUGH if rates["vision"] or rates["delta"] else FORWARD
        language = _factor({**rates, "language": 0.0} if phase.lora else rates, "language")
        return cls(image=0.0 if cached_tower else tower,
                   view=_factor(rates, "projector") * _weights(model.projector) * config.tokens_per_image,
                   pair=(_factor(rates, "delta") * _delta_products(model)
                         + after_delta * _weights(getattr(model, "delta_projector", nn.Identity()))
                         * (config.delta_num_tokens + config.num_fused_tokens - len(config.delta_classes))),
                   token=language * sum(map(_weights, blocks)) + LEARNS * adapters,
                   answer_token=language * _weights(model.language.get_output_embeddings()),
                   views_joined=config.reading == "C")

    def __call__(self, counts: Mapping[str, float]) -> float:
        """Return the FLOPs of steps that contain these numbers of `images`, `pairs`, `tokens` and `answer_tokens`."""
        views = counts["images"] - (counts["pairs"] if self.views_joined else 0)
        return (self.image * counts["images"] + self.view * views + self.pair * counts["pairs"]
                + self.token * counts["tokens"] + self.answer_token * counts["answer_tokens"])


# Maps each part of the model to the parts whose outputs it reads, and to which it passes gradients.
BEFORE = {"vision": (), "delta": ("vision",), "projector": ("vision",), "language": ("vision", "delta", "projector")}


def _factor(rates: Mapping[str, float], part: str) -> float:
    """Return the FLOPs per token for each weight of a part: 6, 4 or 2, depending on which parts are trainable."""
    if rates[part]:
        return LEARNS
    return PASSED_THROUGH if any(rates[other] for other in BEFORE[part]) else FORWARD


def _weights(module: nn.Module) -> int:
    """Count the weights of all linear layers in the module.

    The count uses layer attributes instead of the weight tensors, because ZeRO 3 replaces these by empty tensors.
    """
    return sum(m.in_features * m.out_features for m in module.modules() if isinstance(m, nn.Linear))


def _filters(module: nn.Module) -> int:
    """Count the weights of all convolutions in the module, by their attributes as in `_weights`."""
    return sum(m.in_channels * m.out_channels * m.kernel_size[0] * m.kernel_size[1]
               for m in module.modules() if isinstance(m, nn.Conv2d))


def _tower_products(tower: nn.Module, num_patches: int) -> int:
    """Count the multiplications of the vision tower for one image.

    Linear layers process every token, including the class token; the patch embedding processes each patch.
    """
    classes = sum(name.endswith("class_embedding") for name, _ in tower.named_parameters())
    return _filters(tower) * num_patches + _weights(tower) * (num_patches + classes)


def _delta_products(model: OneDiffForConditionalGeneration) -> int:
    """Count the multiplications of the Visual Delta Module for one pair.

    In token layout B, this includes the `enhance` module, which adds the delta tokens to the patches. The
    multiplications of Fusion are included if the model has it.
    """
    if model.delta is None:
        return 0
    delta, num_patches, num_tokens = model.delta, model.config.num_patches, model.config.delta_num_tokens
    num_states = (3 if delta.inputs == "pair_and_difference" else 2) * num_patches
    num_keys = num_states + (num_patches if model.fusion else 0)
    reduced = _weights(delta.reduce)
    if delta.inputs == "pair_and_matched_difference":
        reduced += _weights(delta.contrast)
    total = len(delta.level_norms) * num_states * reduced
    for layer in delta.layers:
        assert isinstance(layer, DeltaLayer), "every layer of the Visual Delta Module must be a DeltaLayer"
        total += _attention_products(layer.self_attention, num_tokens, num_tokens)
        if layer.cross_attention is not None:
            total += _attention_products(layer.cross_attention, num_tokens, num_keys)
        total += num_tokens * (_weights(layer.up) + _weights(layer.down))
    if model.config.reading == "B":
        enhance, patches = model.enhance, 2 * num_patches
        total += patches * (_weights(enhance.reduce) + _weights(enhance.expand))
        # The delta tokens are attended to twice, once by the patches of each image.
        total += _attention_products(enhance.attention, patches, 2 * num_tokens)
    return total + (_fusion_products(model.fusion, model.config) if model.fusion else 0)


def _fusion_products(fusion: Fusion, config: OneDiffConfig) -> int:
    """Count the multiplications of the linear layers and convolutions of Fusion for one pair."""
    px, places, thing = config.vision_config.image_size, fusion.side**2, fusion.object
    stem = [(fusion.stem.first, (px // 2) ** 2), (fusion.stem.second, (px // 4) ** 2),
            (fusion.coarser, places)]
    joined = _filters(fusion.mix) + _filters(fusion.places) + _weights(fusion.join_stem)
    return (2 * sum(_filters(part) * positions for part, positions in stem) + joined * places
            + (_weights(fusion.join_tower) + _weights(fusion.keys)) * config.num_patches
            + _weights(thing.describe) + _weights(thing.changed) + _weights(thing.camera) + _weights(thing.attributes)
            + _weights(fusion.join_camera))


def _attention_products(attention: Attention, queries: int, keys: int) -> int:
    """Count the multiplications in the four linear layers of an attention module.

    With few queries, the module applies the key and value weights to the queries instead of the keys.
    """
    num_keys_and_values = queries if attention.has_few_queries(queries, keys) else keys
    return (queries * (_weights(attention.query) + _weights(attention.out))
            + num_keys_and_values * (_weights(attention.key) + _weights(attention.value)))
