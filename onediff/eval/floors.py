"""Captions that the model's scores are compared with: trivial baselines and human or generated references.

A trivial baseline ignores the images or does not understand them. A model that is useful must score higher.

Shapes:  E = 2 images x 8 x 8 positions x 3 colors.
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
from onediff.eval.analysis.grammar import matching_templates
from onediff.eval.metrics.catalog import METRICS
from onediff.eval.metrics.compute import score
from onediff.eval.metrics.ngrams import corpus_cider
from onediff.eval.metrics.words import Predictions, References, clean
from onediff.eval.protocols import PairRow, texts_of
from onediff.inputs.images import open_image

NUM_CANDIDATES = 30  # number of frequent training captions that are tried as the best constant sentence
NUM_FINALISTS = 3  # number of best captions on a sample of pairs that are then compared on all pairs
MAX_LEFT_OUT = 3  # largest number of references of a pair that `leave_one_out` uses as predictions
SAMPLE = 100  # number of test pairs in the sample on which captions are tried as the best constant sentence
SIDE = 8  # width and height in pixels to which `coarse_pixels` reduces each image
MAX_TRAIN_PAIRS = 10_000  # largest number of training pairs among which NearestPairs searches


def floor_captions(train: Sequence[PairRow], references: References, *, nearest: Mapping[str, PairRow] | None = None,
                   joined: bool = False, seed: int = 0) -> dict[str, Predictions]:
    """Return the captions that each trivial baseline gives to the test pairs, as {baseline: {pair_id: caption}}.

    `constant`: for all pairs, the training caption with which CIDEr is highest. `random_train`: a random training
    caption for each pair. `nearest_train`: the caption of the training pair with the most similar images; `nearest` has
    this training pair for each test pair, and the baseline is left out if `nearest` is None. If `joined` is True,
    `random_train` and `nearest_train` join all sentences of a training pair to one caption. The result is empty if
    there are no training captions.
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
    """Return the frequent training caption that reaches the highest CIDEr when it is predicted for every pair.

    The most frequent training captions are compared on a random sample of the test pairs. The best captions on the
    sample are then compared on all test pairs. Raises ValueError if there are no training captions.
    """
    if not train:
        raise ValueError("the best constant sentence is chosen from training captions, but there are none; "
                         "give training captions or leave the trivial baselines out")
    candidates = [text for text, _ in Counter(clean(text) for text in train).most_common(NUM_CANDIDATES)]
    keys = list(references)
    chosen = np.random.default_rng(seed).permutation(len(keys))[:SAMPLE]
    sample = {keys[i]: references[keys[i]] for i in sorted(chosen)}

    def constant_cider(text: str, pairs: References) -> float:
        return corpus_cider(dict.fromkeys(pairs, text), pairs)

    ranked = sorted(candidates, key=lambda text: -constant_cider(text, sample))
    return max(ranked[:NUM_FINALISTS], key=lambda text: constant_cider(text, references))


def random_captions(train: Sequence[str], keys: Iterable[str], *, seed: int = 0) -> Predictions:
    """Return a random training caption for each pair_id in `keys`, as {pair_id: caption}.

    The captions are drawn with replacement. The same seed gives the same captions.
    """
    names = list(keys)
    drawn = np.random.default_rng(seed).integers(len(train), size=len(names))
    return {key: train[i] for key, i in zip(names, drawn, strict=True)}


class NearestPairs:
    """Finds the training pair with the most similar images.

    The distance of two pairs is the Euclidean distance of their vectors from `coarse_pixels`.
    """

    def __init__(self, train: Sequence[PairRow], records: Iterable[Record], *, seed: int = 0) -> None:
        """Index up to MAX_TRAIN_PAIRS random rows of `train`; `records` contains the images of these rows.

        Raises OSError for an image that cannot be read.
        """
        import faiss

        drawn = np.random.default_rng(seed).permutation(len(train))[:MAX_TRAIN_PAIRS]
        candidates = {train[place]["pair_id"]: train[place] for place in sorted(drawn)}
        names, vectors = _coarse_records(record for record in records if record.pair_id in candidates)
        self.rows = [candidates[name] for name in names]
        faiss.omp_set_num_threads(1)  # On a busy machine, several faiss threads slow each other down.
        self.index = faiss.IndexFlatL2(vectors.shape[1])
        self.index.add(vectors)

    def __call__(self, records: Iterable[Record]) -> dict[str, PairRow]:
        """Return the nearest training row for each record, as {pair_id of the record: training row}.

        The captions of these rows are the trivial baseline `nearest_train`. Raises OSError for an image that cannot be
        read.
        """
        keys, queries = _coarse_records(records)
        places = self.index.search(queries, 1)[1][:, 0]
        return {key: self.rows[place] for key, place in zip(keys, places, strict=True)}


def _coarse_records(records: Iterable[Record]) -> tuple[list[str], NDArray[np.float32]]:
    vectors = {record.pair_id: coarse_pixels(open_image(record.before), open_image(record.after))
               for record in records if record.num_images == 2}
    return list(vectors), np.stack(list(vectors.values()))


def coarse_pixels(before: Image.Image, after: Image.Image) -> NDArray[np.float32]:
    """Return one vector for a pair, (E,): the pixels of `before`, followed by the pixels of `after` minus `before`.

    Each image is first reduced to 8 x 8 pixels with 3 colors and values from 0 to 1, so E is 2 x 8 x 8 x 3.
    """
    small = [np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float32) / 255
             for image in (before, after)]
    return np.concatenate([small[0].ravel(), (small[1] - small[0]).ravel()])


def leave_one_out(references: References, *, metrics: Sequence[str] = METRICS) -> dict[str, float]:
    """Score references as if they were predictions, against the other references of the same pair.

    The scores show how well the references of a pair agree; if people wrote the references, people reach these scores.
    Up to MAX_LEFT_OUT references of each pair are used as the prediction, one after the other, and the scores are
    averaged. `num_pairs` is the number of pairs with at least two references; the result is empty if there are fewer
    than two such pairs.
    """
    several = {key: texts for key, texts in references.items() if len(texts) > 1}
    if len(several) < 2:  # With only one pair, all word weights of CIDEr are 0.
        return {}
    num_turns = min(MAX_LEFT_OUT, *map(len, several.values()))
    scores = [score({key: texts[out] for key, texts in several.items()},
                    {key: [*texts[:out], *texts[out + 1 :]] for key, texts in several.items()},
                    metrics=metrics).corpus for out in range(num_turns)]
    return {"num_pairs": len(several), **{name: sum(each[name] for each in scores) / num_turns for name in metrics}}


def oracle(row: PairRow) -> str:
    """Return a correct caption for a generated pair of scenes, from a template that no reference of the pair uses.

    If the references already use all templates of the change type, any of these templates is used. The score of this
    caption shows which score a model without errors can reach.
    """
    rng = np.random.default_rng(zlib.crc32(row["pair_id"].encode()))
    templates = SCENE_TEMPLATES[row["change_type"]]
    used = {template for text in row["references"] for template in matching_templates(text, row["change_type"])}
    template = pick(rng, tuple(text for text in templates if text not in used) or templates)
    if row["change_type"] == "none":
        return template
    new = row["provenance"]["new"] or ""
    thing = _thing(row["provenance"]["object"])
    others = [_thing(other) for other in row["provenance"]["objects"] if _thing(other) != thing]
    unique = describe(rng, thing, [*others, thing])  # a phrase that describes only this object of the scene
    phrase = unique or noun(rng, thing, {"size", "material"})
    return template.format(old=phrase, new=DIRECTIONS.get(new) or say(rng, new))


def _thing(attributes: dict[str, Any]) -> Thing:
    return Thing(**{name: attributes[name] for name in ("shape", "color", "size", "material", "x", "y")}, rotation=0.0)
