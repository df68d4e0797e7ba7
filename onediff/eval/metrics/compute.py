"""Captions against references: BLEU-1..4, METEOR, ROUGE-L, CIDEr and SPICE, equal to pycocoevalcap's.

The tokenizer and METEOR are its Java programs, which start together and stay for later calls. BLEU, ROUGE-L and CIDEr
are computed here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onediff.eval.metrics import ngrams, spice, words
from onediff.eval.metrics.java import stop
from onediff.eval.metrics.meteor import Meteor
from onediff.eval.metrics.words import clean, tokenize
from onediff.eval.pairs import Predictions, References, check_keys, cider, tokenized

__all__ = ["FAST_METRICS", "METRICS", "OPTIONAL", "Meteor", "Predictions", "References", "Scores", "check_keys",
           "cider", "clean", "score", "start", "stop", "tokenize"]

METRICS = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr")
FAST_METRICS = tuple(name for name in METRICS if name != "METEOR")
OPTIONAL = ("SPICE",)  # needs a download of 384 MB
RANGES = {**dict.fromkeys((*METRICS, *OPTIONAL), (0.0, 1.0)), "CIDEr": (0.0, 10.0)}
Numbers = NDArray[np.float64]

_meteor = Meteor()  # no Java before it is asked


@dataclass(frozen=True)
class Scores:
    """`corpus`: one number per metric; `items`: one per pair, in the order of the references; `statistics` of BLEU and
    METEOR: a row per pair, whose sums over any pairs decide the corpus score of these (onediff/eval/resample.py).
    """

    corpus: dict[str, float]
    items: dict[str, list[float]]
    statistics: dict[str, Numbers]


def start(metrics: Sequence[str] = METRICS) -> None:
    """Begins to load the Java programs that these metrics need, and returns at once; `score` does so, too."""
    words.start()
    if "METEOR" in metrics:
        _meteor.start()


def score(predictions: Predictions, references: References, *, metrics: Sequence[str] = METRICS) -> Scores:
    """BLEU, METEOR, ROUGE-L and SPICE from 0 to 1, CIDEr-D from 0 to 10 (papers print all of them times 100).

    METEOR takes some seconds to start, once in a process: the others are computed meanwhile. SPICE takes minutes, and
    downloads what it needs once. An empty prediction scores 0, and so does whatever is said of a pair whose only
    reference is empty: seven test pairs of Spot-the-Diff are published so, and papers score them.
    Raises ValueError if the keys differ, or if a Java program or a download fails; then nothing is scored.
    """
    unknown = [name for name in metrics if name not in METRICS + OPTIONAL]
    if unknown:
        raise ValueError(f"unknown metrics {unknown}; known are {[*METRICS, *OPTIONAL]}")
    check_keys(predictions, references)
    if "SPICE" in metrics:
        spice.fetch()
    start(metrics)
    pairs = tokenized(predictions, references)
    statistics: dict[str, Numbers] = {}
    found: dict[str, tuple[float, list[float]]] = {}
    sentences = ngrams.read(pairs)
    if any(name.startswith("BLEU") for name in metrics):
        statistics["BLEU"] = ngrams.bleu_counts(sentences)
        found |= _bleu(statistics["BLEU"])
    if "ROUGE-L" in metrics:
        found["ROUGE-L"] = _mean(ngrams.rouge(pairs))
    if "CIDEr" in metrics:
        found["CIDEr"] = _mean(ngrams.cider(sentences))
    if "METEOR" in metrics:
        whole, each, statistics["METEOR"] = _meteor.score(pairs)
        found["METEOR"] = whole, each
    if "SPICE" in metrics:
        found["SPICE"] = _mean(spice.spice(pairs))
    return Scores({name: found[name][0] for name in metrics}, {name: found[name][1] for name in metrics}, statistics)


def _bleu(counts: Numbers) -> dict[str, tuple[float, list[float]]]:
    whole = counts.sum(0, keepdims=True)
    return {f"BLEU-{order}": (float(ngrams.bleu(whole, order)[0]), ngrams.bleu(counts, order).tolist())
            for order in range(1, ngrams.ORDERS + 1)}


def _mean(values: Numbers) -> tuple[float, list[float]]:
    return float(values.mean()), values.tolist()
