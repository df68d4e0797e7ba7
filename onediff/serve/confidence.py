"""A caption together with how sure the model was of its words."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch import Tensor

from onediff.model.captioner import Captioner


@torch.inference_mode()
def caption_with_confidence(captioner: Captioner, pairs: list[tuple[Image.Image, Image.Image]], *,
                            instructions: list[str] | None = None, max_new_tokens: int = 64,
                            num_beams: int = 1) -> list[tuple[str, float]]:
    """The very captions of `captioner.caption`, each with the geometric mean of its tokens' probabilities, 0 to 1.

    The token that ends a caption counts: when to stop is part of what was said.
    """
    model, tokenizer = captioner.model, captioner.processor.tokenizer
    batch = captioner.processor(pairs, instructions).to(model.device)
    said: Any = model.generate(**batch, max_new_tokens=max_new_tokens, num_beams=num_beams, do_sample=False,
                               pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
                               return_dict_in_generate=True, output_scores=True)
    # Of beams transformers keeps log-probabilities, otherwise logits.
    logs = model.language.compute_transition_scores(said.sequences, said.scores, said.get("beam_indices"),
                                                    normalize_logits=num_beams == 1)  # (B, S)
    texts = tokenizer.batch_decode(said.sequences, skip_special_tokens=True)
    means = _means(logs.float(), said.sequences, tokenizer.eos_token_id)
    return [(" ".join(text.split()), mean) for text, mean in zip(texts, means, strict=True)]


def _means(logs: Tensor, ids: Tensor, end: int) -> list[float]:
    """logs, ids (B, S) -> exp of each row's mean up to its first end, that included; what follows is padding."""
    ends = ids == end
    spoken = ends.cumsum(1) - ends.long() == 0
    return (logs.masked_fill(~spoken, 0).sum(1) / spoken.sum(1)).exp().tolist()
