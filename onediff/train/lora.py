"""Low-rank adapters (LoRA, by peft) for the language model: trained beside frozen weights and merged on export."""

from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from onediff.config import Lora

_BASE, _DOWN, _UP = ".base_layer.", ".lora_A.default.", ".lora_B.default."


def add(language: nn.Module, settings: Lora) -> None:
    """Add a LoRA adapter to every linear layer of the transformer blocks, but not to the output layer."""
    blocks = language.get_decoder().layers  # type: ignore[operator]
    names = {name.rsplit(".", 1)[-1] for name, module in blocks.named_modules() if isinstance(module, nn.Linear)}
    inject_adapter_in_model(LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=sorted(names)),
                            language)


def is_adapter(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


def merged(weights: dict[str, Tensor], settings: Lora) -> dict[str, Tensor]:
    """Merge the adapters into the base weights and return the weights of a model without adapters.

    A merged weight is base + alpha / rank * up @ down, computed in float32.
    """
    plain = {name: value for name, value in weights.items() if not is_adapter(name)}
    for name in plain:
        if _BASE in name and (down := weights.get(name.replace(_BASE, _DOWN))) is not None:
            up = weights[name.replace(_BASE, _UP)]
            total = plain[name].float() + settings.alpha / settings.rank * up.float() @ down.float()
            plain[name] = total.to(plain[name].dtype)
    return {name.replace(_BASE, "."): value for name, value in plain.items()}
