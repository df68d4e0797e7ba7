"""Captioner: a trained OneDiff model with its processor, which writes captions for pairs of images."""

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
    """A trained model that writes captions, and the processor that prepares images and prompts for this model."""

    def __init__(self, model: OneDiffForConditionalGeneration, processor: OneDiffProcessor) -> None:
        self.model, self.processor = model.eval(), processor

    @classmethod
    def load(cls, folder: Path, *, device: str = "auto") -> Captioner:
        """Load a captioner from a model folder that a training phase wrote. Raises the errors of `load_trained`.

        `device` is "auto" (CUDA if there is a GPU, otherwise the CPU), "cpu" or "cuda".
        """
        model, processor = load_trained(folder)
        return cls(model.to(pick_device(device)), processor)

    def caption(self, pairs: list[Pair], *, instructions: list[str] | None = None, max_new_tokens: int = 64,
                num_beams: int = 1) -> list[str]:
        """Return one caption per pair of images, which describes what changed from the first image to the second.

        `instructions` holds one instruction per pair; None asks "What changed between the two images?" for each pair.
        Decoding is greedy if `num_beams` is 1, and beam search otherwise.
        """
        generated = self._generate(pairs, instructions, max_new_tokens=max_new_tokens, num_beams=num_beams)
        return clean_captions(self.processor.tokenizer, generated.sequences)

    @torch.inference_mode()
    def caption_with_confidence(self, pairs: list[Pair], *, instructions: list[str] | None = None,
                                max_new_tokens: int = 64, num_beams: int = 1) -> list[tuple[str, float]]:
        """Return one caption per pair, as the method `caption` does, each with a confidence from 0 to 1.

        The confidence is the geometric mean of the probabilities of the caption's tokens, including the end token.
        """
        generated = self._generate(pairs, instructions, max_new_tokens=max_new_tokens, num_beams=num_beams,
                                   output_scores=True)
        # Greedy decoding returns logits as `scores`, which need normalization; beam search returns log-probabilities.
        logs = self.model.language.compute_transition_scores(
            generated.sequences, generated.scores, generated.get("beam_indices"), normalize_logits=num_beams == 1)
        means = _mean_probability(logs.float(), generated.sequences, self.processor.tokenizer.eos_token_id)
        return list(zip(clean_captions(self.processor.tokenizer, generated.sequences), means, strict=True))

    @torch.inference_mode()
    def _generate(self, pairs: list[Pair], instructions: list[str] | None, **options: Any) -> Any:
        """Return the output object of transformers' `generate`, whose `sequences` are token ids (pairs, tokens)."""
        tokenizer = self.processor.tokenizer
        batch = self.processor(pairs, instructions).to(self.model.device)
        return self.model.generate(**batch, do_sample=False, pad_token_id=tokenizer.pad_token_id,
                                   eos_token_id=tokenizer.eos_token_id, return_dict_in_generate=True, **options)


def clean_captions(tokenizer: Any, ids: Tensor) -> list[str]:
    """Decode each row of token ids to a text without special tokens and with single spaces between words."""
    return [" ".join(text.split()) for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]


def _mean_probability(logs: Tensor, ids: Tensor, end: int) -> list[float]:
    """Return the geometric mean of the token probabilities of each caption.

    `logs` are the log-probabilities of the token ids `ids`, both (captions, tokens). Tokens after the first token
    with id `end` are padding and are not counted.
    """
    ends = ids == end
    counted = ends.cumsum(1) - ends.long() == 0
    return (logs.masked_fill(~counted, 0).sum(1) / counted.sum(1)).exp().tolist()


def pick_device(wanted: str) -> torch.device:
    """Return the torch device for "auto", "cpu" or "cuda". Raises ValueError for "cuda" if PyTorch can use no GPU."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' needs a GPU that PyTorch can use, but there is none; use device auto or cpu")
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted)
