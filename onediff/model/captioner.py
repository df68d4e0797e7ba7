"""A trained model and its processor, put to work on pairs."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from onediff.inputs.processing import OneDiffProcessor
from onediff.model.onediff import OneDiffForConditionalGeneration
from onediff.model.weights import load_trained


class Captioner:
    def __init__(self, model: OneDiffForConditionalGeneration, processor: OneDiffProcessor) -> None:
        self.model, self.processor = model.eval(), processor

    @classmethod
    def load(cls, folder: Path, *, device: str = "auto") -> Captioner:
        """A `save_pretrained` folder. Raises as `load_trained`."""
        model, processor = load_trained(folder)
        return cls(model.to(pick_device(device)), processor)

    @torch.inference_mode()
    def caption(self, pairs: list[tuple[Image.Image, Image.Image]], *, instructions: list[str] | None = None,
                max_new_tokens: int = 64, num_beams: int = 1) -> list[str]:
        """What changed from the first to the second image of each pair, greedily unless `num_beams` is above 1.

        One instruction per pair, or "What changed between the two images?" for all.
        """
        batch = self.processor(pairs, instructions).to(self.model.device)
        tokenizer = self.processor.tokenizer
        ids = self.model.generate(**batch, max_new_tokens=max_new_tokens, num_beams=num_beams, do_sample=False,
                                  pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
        return [" ".join(text.split()) for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]


def pick_device(wanted: str) -> torch.device:
    """Raises ValueError if CUDA is asked for and absent."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' was asked for, but torch sees none; use device auto or cpu")
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted)
