from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from onediff.data.record import Record
from onediff.eval.floors import (
    NearestPairs,
    best_constant,
    coarse_pixels,
    floor_captions,
    leave_one_out,
    oracle,
    random_captions,
)
from onediff.eval.metrics.catalog import FAST_METRICS
from onediff.eval.metrics.compute import score
from onediff.eval.metrics.ngrams import corpus_cider

REFERENCES = {f"p{i}": [f"the {color} cube was removed", f"the {color} block is gone"] for i, color in
              enumerate(["red", "red", "red", "red", "blue", "green"])} | {"p6": ["a small ball appeared"]}
TRAIN = ["the red cube was removed"] * 3 + ["a ball appeared"] * 5 + ["it rained"] * 7 + ["the blue block is gone"]


def test_best_constant_is_the_training_caption_with_the_highest_cider() -> None:
    scores = {text: corpus_cider(dict.fromkeys(REFERENCES, text), REFERENCES) for text in set(TRAIN)}
    best = max(scores, key=lambda text: scores[text])
    assert best_constant(TRAIN, REFERENCES) == best == "the red cube was removed"


def test_trivial_baselines_use_the_captions_of_training_rows() -> None:
    train = [{"pair_id": f"t{i}", "references": [text, "others"]} for i, text in enumerate(TRAIN)]
    nearest = {key: train[i] for i, key in enumerate(REFERENCES)}
    got = floor_captions(train, REFERENCES, nearest=nearest, seed=3)
    assert list(got) == ["constant", "random_train", "nearest_train"]
    assert set(got["constant"].values()) == {"the red cube was removed"}
    assert set(got["random_train"].values()) < {*TRAIN, "others"} and len(set(got["random_train"].values())) > 1
    assert got["nearest_train"] == {key: row["references"][0] for key, row in nearest.items()}
    joined = floor_captions(train, REFERENCES, nearest=nearest, joined=True)
    assert joined["nearest_train"]["p0"] == f"{TRAIN[0]} others"
    assert set(joined["random_train"].values()) < {f"{text} others" for text in TRAIN}
    assert floor_captions([], REFERENCES) == {}


def test_leave_one_out_scores_a_reference_against_the_other_references_of_the_pair() -> None:
    got = leave_one_out(REFERENCES, metrics=FAST_METRICS)
    pairs = [key for key, texts in REFERENCES.items() if len(texts) > 1]
    first_scored, second_scored = (
        score({key: REFERENCES[key][scored] for key in pairs},
              {key: [REFERENCES[key][1 - scored]] for key in pairs}, metrics=FAST_METRICS).corpus
        for scored in (0, 1))
    assert got.pop("num_pairs") == len(pairs) == 6
    assert got == {name: pytest.approx((first_scored[name] + second_scored[name]) / 2) for name in FAST_METRICS}
    assert leave_one_out({"a": ["x"], "b": ["y"]}, metrics=FAST_METRICS) == {}
    equal = {key: [key, key, key, "other words"] for key in ("the red cube left", "a blue ball came in")}
    assert leave_one_out(equal, metrics=["ROUGE-L"])["ROUGE-L"] == pytest.approx(1)


def test_equal_seeds_give_equal_random_captions() -> None:
    assert random_captions(TRAIN, REFERENCES, seed=1) == random_captions(TRAIN, REFERENCES, seed=1)
    assert random_captions(TRAIN, map(str, range(50)), seed=1) != random_captions(TRAIN, map(str, range(50)), seed=2)


def test_best_constant_without_training_captions_is_refused() -> None:
    with pytest.raises(ValueError, match="there are none; give training captions"):
        best_constant([], REFERENCES)


def test_oracle_uses_a_template_that_no_reference_uses() -> None:
    cube = {"shape": "cube", "color": "red", "size": "big", "material": "matte", "x": 0.0, "y": 1.0}
    row = {"pair_id": "a", "change_type": "move",
           "provenance": {"object": cube, "new": "front", "objects": [cube, cube | {"color": "blue", "x": 2.0}]},
           "references": ["the red cube moved to the front", "the red cube was moved to the front",
                          "someone pushed the red block to the front", "the red cube has shifted to the front"]}
    assert oracle(row).startswith("the ") and oracle(row).endswith("changed its location to the front")


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def record(split: str, number: int, *, noise: int = 0) -> Record:
    rng = np.random.default_rng(number)
    before, after = (rng.integers(0, 200, (40, 40, 3), dtype=np.uint8) for _ in range(2))
    before, after = (side + np.random.default_rng(noise).integers(0, noise + 1, side.shape, dtype=np.uint8)
                     for side in (before, after))
    name = f"{split}-{number}"
    return Record(name, "street", split, str(number), png(before), png(after), [str(number)], "", "x", {})


def test_the_nearest_training_pair_of_a_noisy_copy_is_the_copied_pair() -> None:
    train, test = [record("train", k) for k in range(11)], [record("test", k, noise=40) for k in (7, 2, 5)]
    rows = [{"pair_id": item.pair_id, "references": item.references} for item in train]
    nearest = NearestPairs(rows, train)(test)
    assert {key: row["pair_id"] for key, row in nearest.items()} == {f"test-{k}": f"train-{k}" for k in (7, 2, 5)}


def test_coarse_pixels_depend_on_both_images_and_on_their_order() -> None:
    gray, white = Image.new("RGB", (40, 40), "gray"), Image.new("RGB", (40, 40), "white")
    unchanged, changed, undone = coarse_pixels(gray, gray), coarse_pixels(gray, white), coarse_pixels(white, gray)
    assert np.linalg.norm(changed - unchanged) > 1 and np.linalg.norm(changed - undone) > 1
