"""What scores are read against: floors that never see an image, and an oracle that says the truth in other words."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from onediff.data.synthesis.phrases import DIRECTIONS, SCENE_TEMPLATES, pick, say
from onediff.data.synthesis.render import Thing
from onediff.data.synthesis.scenes.captions import describe, noun
from onediff.eval.analysis.behaviour import Row, matching_templates
from onediff.eval.metrics.compute import METRICS, Predictions, References, cider, clean, score
from onediff.eval.protocols import texts_of

NUM_CANDIDATES = 30
NUM_FINALISTS = 3
LEFT_OUT = 3  # references at most that take their turn as a prediction
SAMPLE = 100  # pairs on which the candidates for the constant sentence are compared first


def floor_captions(train: Sequence[Row], references: References, *, nearest: Mapping[str, Row] | None = None,
                   joined: bool = False, seed: int = 0) -> dict[str, Predictions]:
    """What is said by systems that understand no image, all from training captions: `constant`, the best sentence for
    every pair; `random_train`, any one; `nearest_train`, that of the training pair whose pixels are nearest, where
    these are known. Empty without training captions.
    """
    texts = [text for row in train for text in row["references"]]
    if not texts:
        return {}
    whole = [text for row in train for text in texts_of(row, joined=joined)]
    found = {"constant": _always(best_constant(texts, references, seed=seed), references),
             "random_train": random_captions(whole, references, seed=seed)}
    if nearest:
        found["nearest_train"] = {key: texts_of(nearest[key], joined=joined)[0] for key in references}
    return found


def best_constant(train: Sequence[str], references: References, *, seed: int = 0) -> str:
    """Of the most frequent training captions the one with the highest CIDEr, so that the floor is as high as it can be.

    All are compared on a sample of the pairs, the best few on all of them. Raises ValueError without training captions.
    """
    if not train:
        raise ValueError("floors need training captions, got none")
    candidates = [text for text, _ in Counter(clean(text) for text in train).most_common(NUM_CANDIDATES)]
    keys = list(references)
    chosen = np.random.default_rng(seed).permutation(len(keys))[:SAMPLE]
    sample = {keys[i]: references[keys[i]] for i in sorted(chosen)}
    ranked = sorted(candidates, key=lambda text: -cider(_always(text, sample), sample))
    return max(ranked[:NUM_FINALISTS], key=lambda text: cider(_always(text, references), references))


def _always(sentence: str, references: References) -> Predictions:
    return dict.fromkeys(references, sentence)


def random_captions(train: Sequence[str], keys: Iterable[str], *, seed: int = 0) -> Predictions:
    """A training caption for every key, drawn with replacement. Same seed, same captions."""
    names = list(keys)
    drawn = np.random.default_rng(seed).integers(len(train), size=len(names))
    return {key: train[i] for key, i in zip(names, drawn, strict=True)}


def leave_one_out(references: References, *, metrics: Sequence[str] = METRICS) -> dict[str, float]:
    """How far the references agree: each of the first ones scored against the others of its pair, the mean of these
    scores; what people reach, where people wrote them. Beside it `num_pairs`, those with two references or more; empty
    where there are fewer than two.
    """
    several = {key: texts for key, texts in references.items() if len(texts) > 1}
    if len(several) < 2:  # one pair alone has no document frequencies
        return {}
    turns = min(LEFT_OUT, *map(len, several.values()))
    found = [score({key: texts[out] for key, texts in several.items()},
                   {key: [*texts[:out], *texts[out + 1 :]] for key, texts in several.items()},
                   metrics=metrics).corpus for out in range(turns)]
    return {"num_pairs": len(several), **{name: sum(each[name] for each in found) / turns for name in metrics}}


def oracle(row: Row) -> str:
    """The truth about a pair of scenes in a sentence that its references do not use, where there is one."""
    rng = np.random.default_rng(zlib.crc32(row["pair_id"].encode()))
    templates = SCENE_TEMPLATES[row["change_type"]]
    used = {template for text in row["references"] for template in matching_templates(text, row["change_type"])}
    template = pick(rng, tuple(text for text in templates if text not in used) or templates)
    if row["change_type"] == "none":
        return template
    new = row["provenance"]["new"] or ""
    return template.format(old=_phrase(rng, row), new=DIRECTIONS.get(new) or say(rng, new))


def _phrase(rng: np.random.Generator, row: Row) -> str:
    """The changed object in words that fit no other object of its scene."""
    thing = _thing(row["provenance"]["object"])
    others = [_thing(other) for other in row["provenance"]["objects"] if _thing(other) != thing]
    return describe(rng, thing, [*others, thing]) or noun(rng, thing, {"size", "material"})


def _thing(attributes: dict[str, Any]) -> Thing:
    return Thing(**{name: attributes[name] for name in ("shape", "color", "size", "material", "x", "y")}, rotation=0.0)
