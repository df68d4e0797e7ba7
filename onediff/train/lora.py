"""Low-rank adapters for the language model, by peft: trained beside frozen weights, merged into them on export."""

from __future__ import annotations

from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from onediff.config import Lora

_BASE, _DOWN, _UP = ".base_layer.", ".lora_A.default.", ".lora_B.default."


def add(language: nn.Module, settings: Lora) -> None:
    """On every linear layer of the blocks; the output layer stays as it is."""
    blocks = language.get_decoder().layers  # type: ignore[operator]
    names = {name.rsplit(".", 1)[-1] for name, module in blocks.named_modules() if isinstance(module, nn.Linear)}
    inject_adapter_in_model(LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=sorted(names)),
                            language)


def is_adapter(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


def merged(weights: dict[str, Tensor], settings: Lora) -> dict[str, Tensor]:
    """Weights with adapters -> the weights of the model without them: base + alpha / rank x up x down, in float32."""
    plain: dict[str, Tensor] = {}
    for name, value in weights.items():
        if is_adapter(name):
            continue
        down = weights.get(name.replace(_BASE, _DOWN)) if _BASE in name else None
        if down is not None:
            up = weights[name.replace(_BASE, _UP)]
            value = (value.float() + settings.alpha / settings.rank * up.float() @ down.float()).to(value.dtype)
        plain[name.replace(_BASE, ".")] = value
    return plain
