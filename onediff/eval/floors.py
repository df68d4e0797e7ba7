"""What scores are compared with: floors that understand no image, and an oracle that states the truth in other words.

Shapes:  n pairs, m training pairs, E = 2 images x 8 x 8 places x 3 colors.
"""

import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from onediff.data.record import Record
from onediff.data.synthesis.phrases import DIRECTIONS, SCENE_TEMPLATES, pick, say
from onediff.data.synthesis.render import Thing
from onediff.data.synthesis.scenes.captions import describe, noun
from onediff.eval.analysis.behaviour import matching_templates
from onediff.eval.metrics.catalog import METRICS
from onediff.eval.metrics.compute import score
from onediff.eval.metrics.ngrams import corpus_cider
from onediff.eval.metrics.words import Predictions, References, clean
from onediff.eval.protocols import PairRow, texts_of
from onediff.inputs.images import open_image

NUM_CANDIDATES = 30
NUM_FINALISTS = 3
MAX_LEFT_OUT = 3  # references at most that take their turn as a prediction
SAMPLE = 100  # pairs on which the candidates for the constant sentence are compared first
SIDE = 8
MAX_TRAIN_PAIRS = 10_000  # drawn by seed: more would cost minutes and be the same floor


def floor_captions(train: Sequence[PairRow], references: References, *, nearest: Mapping[str, PairRow] | None = None,
                   joined: bool = False, seed: int = 0) -> dict[str, Predictions]:
    """Captions of systems that understand no image, all from training captions: `constant`, the best sentence for
    every pair; `random_train`, any one; `nearest_train`, that of the training pair whose pixels are nearest, where
    these are known. Empty without training captions.
    """
    texts = [text for row in train for text in row["references"]]
    if not texts:
        return {}
    captions = [text for row in train for text in texts_of(row, joined=joined)]
    memory = {key: texts_of(nearest[key], joined=joined)[0] for key in references} if nearest else None
    return {"constant": dict.fromkeys(references, best_constant(texts, references, seed=seed)),
            "random_train": random_captions(captions, references, seed=seed),
            **({"nearest_train": memory} if memory else {})}


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

    def constant_cider(text: str, pairs: References) -> float:
        return corpus_cider(dict.fromkeys(pairs, text), pairs)

    ranked = sorted(candidates, key=lambda text: -constant_cider(text, sample))
    return max(ranked[:NUM_FINALISTS], key=lambda text: constant_cider(text, references))


def random_captions(train: Sequence[str], keys: Iterable[str], *, seed: int = 0) -> Predictions:
    """A training caption for every key, drawn with replacement. Same seed, same captions."""
    names = list(keys)
    drawn = np.random.default_rng(seed).integers(len(train), size=len(names))
    return {key: train[i] for key, i in zip(names, drawn, strict=True)}


def nearest_rows(train: Sequence[PairRow], train_records: Iterable[Record], records: Iterable[Record],
                 *, seed: int = 0) -> dict[str, PairRow]:
    """The floor of memory: pair_id of every record -> the row of `train` that looks most alike, by coarse pixels and
    no learning. `train_records` have the images of `train`. Raises OSError for an image that cannot be read.
    """
    import faiss

    drawn = np.random.default_rng(seed).permutation(len(train))[:MAX_TRAIN_PAIRS]
    candidates = {train[place]["pair_id"]: train[place] for place in sorted(drawn)}
    names, vectors = _coarse_records(record for record in train_records if record.pair_id in candidates)
    keys, queries = _coarse_records(records)
    faiss.omp_set_num_threads(1)  # on a busy machine its threads wait for each other
    index = faiss.IndexFlatL2(vectors.shape[1])
    index.add(vectors)
    places = index.search(queries, 1)[1][:, 0]
    return {key: candidates[names[place]] for key, place in zip(keys, places, strict=True)}


def _coarse_records(records: Iterable[Record]) -> tuple[list[str], NDArray[np.float32]]:
    vectors = {record.pair_id: coarse_pixels(open_image(record.before), open_image(record.after))
               for record in records if record.num_images == 2}
    return list(vectors), np.stack(list(vectors.values()))


def coarse_pixels(before: Image.Image, after: Image.Image) -> NDArray[np.float32]:
    """(E,): the image before, and what differs after it, coarse; the difference counts as much as its contrast."""
    small = [np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float32) / 255
             for image in (before, after)]
    return np.concatenate([small[0].ravel(), (small[1] - small[0]).ravel()])


def leave_one_out(references: References, *, metrics: Sequence[str] = METRICS) -> dict[str, float]:
    """How far the references agree: each of the first ones scored against the others of its pair, the mean of these
    scores; what people reach, where people wrote them. Beside it `num_pairs`, those with two references or more; empty
    where there are fewer than two.
    """
    several = {key: texts for key, texts in references.items() if len(texts) > 1}
    if len(several) < 2:  # one pair alone has no document frequencies
        return {}
    num_turns = min(MAX_LEFT_OUT, *map(len, several.values()))
    scores = [score({key: texts[out] for key, texts in several.items()},
                    {key: [*texts[:out], *texts[out + 1 :]] for key, texts in several.items()},
                    metrics=metrics).corpus for out in range(num_turns)]
    return {"num_pairs": len(several), **{name: sum(each[name] for each in scores) / num_turns for name in metrics}}


def oracle(row: PairRow) -> str:
    """The truth about a pair of scenes in a sentence that its references do not use, where there is one."""
    rng = np.random.default_rng(zlib.crc32(row["pair_id"].encode()))
    templates = SCENE_TEMPLATES[row["change_type"]]
    used = {template for text in row["references"] for template in matching_templates(text, row["change_type"])}
    template = pick(rng, tuple(text for text in templates if text not in used) or templates)
    if row["change_type"] == "none":
        return template
    new = row["provenance"]["new"] or ""
    thing = _thing(row["provenance"]["object"])
    others = [_thing(other) for other in row["provenance"]["objects"] if _thing(other) != thing]
    unique = describe(rng, thing, [*others, thing])  # words that fit no other object of the scene
    phrase = unique or noun(rng, thing, {"size", "material"})
    return template.format(old=phrase, new=DIRECTIONS.get(new) or say(rng, new))


def _thing(attributes: dict[str, Any]) -> Thing:
    return Thing(**{name: attributes[name] for name in ("shape", "color", "size", "material", "x", "y")}, rotation=0.0)
