"""Predictions beside their references: the same pairs on both sides, as words; and CIDEr of them, as training asks."""

from __future__ import annotations

from onediff.eval.metrics import ngrams
from onediff.eval.metrics.words import tokenize

Predictions = dict[str, str]
References = dict[str, list[str]]


def cider(predictions: Predictions, references: References) -> float:
    """Corpus CIDEr-D, 0 to 10 (papers print it times 100).

    Raises ValueError if the keys differ or no reference has a word. Vedantam et al., CVPR 2015.
    """
    check_keys(predictions, references)
    return float(ngrams.cider(ngrams.read(tokenized(predictions, references))).mean())


def tokenized(predictions: Predictions, references: References) -> list[ngrams.Pair]:
    """Tokens of each pair's prediction and references; all references are one text, all predictions another."""
    truths = iter(tokenize(text for texts in references.values() for text in texts))
    said = tokenize(predictions[key] for key in references)
    return [(text, [next(truths) for _ in texts]) for text, texts in zip(said, references.values(), strict=True)]


def check_keys(predictions: Predictions, references: References) -> None:
    """Raises ValueError unless both sides have the same pairs and every pair at least one reference."""
    missing = [key for key in references if key not in predictions]
    extra = [key for key in predictions if key not in references]
    if missing or extra:
        raise ValueError("predictions and references must have the same pair_ids: "
                         f"{_some(missing)} missing from the predictions, {_some(extra)} not among the references")
    if not references:
        raise ValueError("nothing to score: no references")
    bare = [key for key, texts in references.items() if not texts]
    if bare:
        raise ValueError(f"{_some(bare)} without references: every pair needs at least one")


def _some(keys: list[str]) -> str:
    shown = ", ".join(keys[:5]) + (", ..." if len(keys) > 5 else "")
    return f"{len(keys)} ({shown})" if keys else "0"
