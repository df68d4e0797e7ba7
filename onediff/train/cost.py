"""What training costs: parameters, floating-point operations, and what a GPU can do. Nothing here runs a model.

FLOPs by the convention: per token 6 for each weight of a part that learns, 4 where the part is frozen but the gradient
passes through it, 2 where it only runs forward. Recomputation is not counted (it buys memory, not learning), nor are
attention scores, norms and embedding tables.
Shapes:  N patches per image, K delta tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from onediff.config import Phase
from onediff.model.delta import Attention, DeltaLayer
from onediff.model.onediff import PARTS, OneDiffForConditionalGeneration
from onediff.train.engine import learning_rates

LEARNS, PASSED_THROUGH, FORWARD = 6.0, 4.0, 2.0


@dataclass(frozen=True)
class Gpu:
    """`memory_gib` as torch reports it; `tflops` dense, of bfloat16 where the GPU has it."""

    name: str
    memory_gib: float
    tflops: float
    bfloat16: bool = True


GPUS = (  # the first whose name is in the device's own counts; from the makers' data sheets, without sparsity
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
    """By a device's own name (`NVIDIA H100 80GB HBM3`) or a short one (`h100`)."""
    for gpu in GPUS:
        words = r"[ -]?".join(re.split("[ -]", gpu.name))
        if re.search(rf"{words}(?!\d)", name, re.IGNORECASE):  # so that A4000 is no A40
            return gpu
    return None


def peak_tflops(device_name: str) -> float | None:
    gpu = find_gpu(device_name)
    return gpu.tflops if gpu else None


@dataclass(frozen=True)
class Size:
    """Parameters of one part."""

    learning: int
    frozen: int


def sizes(model: OneDiffForConditionalGeneration) -> dict[str, Size]:
    """By part, after `engine.trainable` froze what does not learn; a model on no device will do."""
    counts = {part: [0, 0] for part in PARTS}
    for name, parameter in model.named_parameters():
        counts[model.part_of(name)][not parameter.requires_grad] += parameter.numel()
    return {part: Size(*count) for part, count in counts.items()}


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of training: per image, pair, token and answer token."""

    image: float  # the tower
    view: float  # the patches' projector: an image or, under reading C, the two of a row
    pair: float
    token: float
    answer_token: float  # logits are made for these alone
    views_joined: bool

    @classmethod
    def of(cls, model: OneDiffForConditionalGeneration, phase: Phase, *, cached_tower: bool) -> Flops:
        """cached_tower: its features were computed beforehand. The model may be on no device, and must not be shared
        out by ZeRO 3 in other shapes than its layers name.
        """
        rates, config = learning_rates(phase), model.config
        blocks = [module for name, module in model.language.get_decoder().named_modules()
                  if isinstance(module, nn.Linear) and "lora_" not in name]
        adapters = phase.lora.rank * sum(m.in_features + m.out_features for m in blocks) if phase.lora else 0
        tower = _factor(rates, "vision") * _tower_products(model.vision.tower, config.num_patches)
        # Of the delta tokens' projector, which follows the tower and the delta module.
        after_delta = LEARNS if rates["projector"] else PASSED_THROUGH if rates["vision"] or rates["delta"] else FORWARD
        language = _factor({**rates, "language": 0.0} if phase.lora else rates, "language")
        return cls(image=0.0 if cached_tower else tower,
                   view=_factor(rates, "projector") * _weights(model.projector) * config.tokens_per_image,
                   pair=(_factor(rates, "delta") * _delta_products(model)
                         + after_delta * _weights(getattr(model, "delta_projector", nn.Identity()))
                         * config.delta_num_tokens),
                   token=language * sum(map(_weights, blocks)) + LEARNS * adapters,
                   answer_token=language * _weights(model.language.get_output_embeddings()),
                   views_joined=config.reading == "C")

    def __call__(self, counts: Mapping[str, float]) -> float:
        """Of steps with these `images`, `pairs` (rows with two of them), `tokens` and `answer_tokens`."""
        views = counts["images"] - (counts["pairs"] if self.views_joined else 0)
        return (self.image * counts["images"] + self.view * views + self.pair * counts["pairs"]
                + self.token * counts["tokens"] + self.answer_token * counts["answer_tokens"])


BEFORE = {"vision": (), "delta": ("vision",), "projector": ("vision",), "language": ("vision", "delta", "projector")}


def _factor(rates: Mapping[str, float], part: str) -> float:
    if rates[part]:
        return LEARNS
    return PASSED_THROUGH if any(rates[other] for other in BEFORE[part]) else FORWARD


def _weights(module: nn.Module) -> int:
    """Multiplications per token in the module's linear layers, by shape, because ZeRO 3 takes the weights away."""
    return sum(m.in_features * m.out_features for m in module.modules() if isinstance(m, nn.Linear))


def _tower_products(tower: nn.Module, num_patches: int) -> int:
    """Multiplications for one image: linear layers see every token, the patch embedding each patch."""
    patches = sum(m.in_channels * m.out_channels * m.kernel_size[0] * m.kernel_size[1]
                  for m in tower.modules() if isinstance(m, nn.Conv2d))
    classes = sum(name.endswith("class_embedding") for name, _ in tower.named_parameters())
    return patches * num_patches + _weights(tower) * (num_patches + classes)


def _delta_products(model: OneDiffForConditionalGeneration) -> int:
    """Multiplications of the Visual Delta Module, and of reading B's enhancement, for one pair."""
    if model.delta is None:
        return 0
    delta, num_patches, num_tokens = model.delta, model.config.num_patches, model.config.delta_num_tokens
    num_states = (3 if delta.inputs == "pair_and_difference" else 2) * num_patches
    reduced = _weights(delta.reduce)
    if delta.inputs == "pair_and_matched_difference":
        reduced += _weights(delta.contrast)
    total = len(delta.level_norms) * num_states * reduced
    for layer in delta.layers:
        assert isinstance(layer, DeltaLayer), "the module's layers are DeltaLayers"
        total += _attention_products(layer.self_attention, num_tokens, num_tokens)
        if layer.cross_attention is not None:
            total += _attention_products(layer.cross_attention, num_tokens, num_states)
        total += num_tokens * (_weights(layer.up) + _weights(layer.down))
    if model.config.reading == "B":
        enhance, patches = model.enhance, 2 * num_patches
        total += patches * (_weights(enhance.reduce) + _weights(enhance.expand))
        total += _attention_products(enhance.attention, patches, 2 * num_tokens)  # the delta tokens, for each image
    return total


def _attention_products(attention: Attention, queries: int, keys: int) -> int:
    num_keys_and_values = queries if attention.has_few_queries(queries, keys) else keys
    return (queries * (_weights(attention.query) + _weights(attention.out))
            + num_keys_and_values * (_weights(attention.key) + _weights(attention.value)))
