"""Low-rank adapters for the language model, by peft: trained beside frozen weights, merged into them on export."""

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
    plain = {name: value for name, value in weights.items() if not is_adapter(name)}
    for name in plain:
        if _BASE in name and (down := weights.get(name.replace(_BASE, _DOWN))) is not None:
            up = weights[name.replace(_BASE, _UP)]
            total = plain[name].float() + settings.alpha / settings.rank * up.float() @ down.float()
            plain[name] = total.to(plain[name].dtype)
    return {name.replace(_BASE, "."): value for name, value in plain.items()}
