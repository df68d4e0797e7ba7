"""A trained model and its processor, which caption pairs of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from onediff.inputs.processing import OneDiffProcessor
from onediff.model.onediff import OneDiffForConditionalGeneration
from onediff.model.weights import load_trained

Pair = tuple[Image.Image, Image.Image]  # before, after


class Captioner:
    def __init__(self, model: OneDiffForConditionalGeneration, processor: OneDiffProcessor) -> None:
        self.model, self.processor = model.eval(), processor

    @classmethod
    def load(cls, folder: Path, *, device: str = "auto") -> Captioner:
        """A `save_pretrained` folder. Raises as `load_trained`."""
        model, processor = load_trained(folder)
        return cls(model.to(pick_device(device)), processor)

    def caption(self, pairs: list[Pair], *, instructions: list[str] | None = None, max_new_tokens: int = 64,
                num_beams: int = 1) -> list[str]:
        """What changed from the first to the second image of each pair, greedily unless `num_beams` is above 1.

        One instruction per pair, or "What changed between the two images?" for all.
        """
        generated = self._generate(pairs, instructions, max_new_tokens=max_new_tokens, num_beams=num_beams)
        return clean_captions(self.processor.tokenizer, generated.sequences)

    @torch.inference_mode()
    def caption_with_confidence(self, pairs: list[Pair], *, instructions: list[str] | None = None,
                                max_new_tokens: int = 64, num_beams: int = 1) -> list[tuple[str, float]]:
        """The same captions as `caption`, each with the geometric mean of the probabilities of its tokens, 0 to 1.

        The token that ends a caption counts, because the model also decides when to stop.
        """
        generated = self._generate(pairs, instructions, max_new_tokens=max_new_tokens, num_beams=num_beams,
                                   output_scores=True)
        # With beams transformers returns log-probabilities, otherwise logits.
        logs = self.model.language.compute_transition_scores(
            generated.sequences, generated.scores, generated.get("beam_indices"), normalize_logits=num_beams == 1)
        means = _mean_probability(logs.float(), generated.sequences, self.processor.tokenizer.eos_token_id)
        return list(zip(clean_captions(self.processor.tokenizer, generated.sequences), means, strict=True))

    @torch.inference_mode()
    def _generate(self, pairs: list[Pair], instructions: list[str] | None, **options: Any) -> Any:
        """The output of transformers' `generate`, with `sequences` (B, S)."""
        tokenizer = self.processor.tokenizer
        batch = self.processor(pairs, instructions).to(self.model.device)
        return self.model.generate(**batch, do_sample=False, pad_token_id=tokenizer.pad_token_id,
                                   eos_token_id=tokenizer.eos_token_id, return_dict_in_generate=True, **options)


def clean_captions(tokenizer: Any, ids: Tensor) -> list[str]:
    """ids (B, S) -> texts without special tokens, with single spaces between words."""
    return [" ".join(text.split()) for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]


def _mean_probability(logs: Tensor, ids: Tensor, end: int) -> list[float]:
    """logs, ids (B, S) -> exp of each row's mean up to and including its first end token; the rest is padding."""
    ends = ids == end
    counted = ends.cumsum(1) - ends.long() == 0
    return (logs.masked_fill(~counted, 0).sum(1) / counted.sum(1)).exp().tolist()


def pick_device(wanted: str) -> torch.device:
    """Raises ValueError if CUDA is asked for and absent."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' was asked for, but torch sees none; use device auto or cpu")
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted)
