"""A small report for tests, made by the code of the report stage from invented results of a model."""

from __future__ import annotations

import io
from typing import Any

from PIL import Image

from onediff.data.record import Record
from onediff.eval.metrics.catalog import METRICS
from onediff.eval.report.figures import INSIDE, POINTING, figures
from onediff.eval.report.gallery import Album, Example, example
from onediff.eval.report.page import ModelResults, render_page


def png(color: str = "red") -> bytes:
    """Return a PNG image of 40 x 20 pixels in one color."""
    buffer = io.BytesIO()
    Image.new("RGB", (40, 20), color).save(buffer, "PNG")
    return buffer.getvalue()


def record(pair_id: str = "a", change_type: str = "add", source: str = "scenes") -> Record:
    """Return a test pair in which a red cube was added; the caption contains HTML tags, which a page must escape."""
    cube = {"shape": "cube", "color": "red", "size": "big", "material": "matte"}
    change = {"object": cube, "new": None, "region_before": None, "region_after": [10, 5, 30, 15]}
    references = ["a red cube <i>was</i> added"]
    return Record(pair_id, source, "test", "g", png(), png("blue"), references, "What?", change_type, change)


def result() -> dict[str, Any]:
    """Return the scores of a benchmark in the form that stage score writes to data/metrics.json."""
    scores = dict.fromkeys(METRICS, 0.5)
    return {**scores, "score_intervals": {name: [0.41, 0.59] for name in METRICS}, "num_pairs": 3,
            "protocol": "coco-caption/v1", "references": "0f", "leave_one_out": {**scores, "num_pairs": 2},
            "floor": {"constant": {**scores, "sentence": "no <change>"}, "random_train": scores},
            "by_change_type": {"add": {"num_pairs": 3, "CIDEr": 1.0, "ROUGE-L": 0.4}}, "change_type_accuracy": 0.8765,
            "false_alarm_rate": 0.0, "change_type_accuracy_by_type": {"add": 0.8765},
            "intervals": {"change_type_accuracy": [0.8, 0.9], "false_alarm_rate": [0.0, 0.0]},
            "changed": {"num_pairs": 2, "CIDEr": 1.0, "oracle_CIDEr": 2.0, "oracle_ratio": 0.5},
            "question": "What <changed>?", "own_question": {"num_pairs": 3, "change_type_accuracy": 0.8642},
            "paraphrases": {"num_pairs": 19, "num_questions": 10, "change_type_accuracy": {
                "default": 0.8531, "mean": 0.7531, "low": 0.7131, "high": 0.7977}},
            "by_picture": {"photograph": {"num_pairs": 23, "operation_accuracy": 0.6543}},
            "swapped_accuracy_by_operation": {"zoom_out": {"num_pairs": 29, "swapped_accuracy": 0.5432}}}


def published_result() -> dict[str, Any]:
    """Return the scores of a benchmark of real photographs, whose true changes are not known to the grammar."""
    read_by_a_grammar = {"changed", "intervals", "own_question", "paraphrases", "by_picture",
                         "swapped_accuracy_by_operation"}
    return {key: value for key, value in result().items() if key not in read_by_a_grammar}


def stress() -> dict[str, Any]:
    """Return the results of stage stress for one benchmark, with fewer perturbations than a real run has."""
    rates = {"false_alarm_rate": 0.25, "same_caption_rate": 0.125,
             "intervals": {"false_alarm_rate": [0.1, 0.4], "same_caption_rate": [0.0, 0.2]}}
    point = {"change_type_accuracy": 0.75, "CIDEr": 1.0, "intervals": {"change_type_accuracy": [0.7, 0.8],
                                                                       "CIDEr": [0.9, 1.1]}}
    keys = (*INSIDE, *POINTING)
    attention = {"num_images": 5, **dict.fromkeys(keys, 0.375), "intervals": {key: [0.3, 0.45] for key in keys}}
    return {"num_pairs": 3, "identical": rates, "swapped": rates,
            "curves": {"noise": {"none": point, "5": point}},
            "attention": {**attention, "by_change_type": {"add": attention}}}


def pair(prediction: str, pair_id: str = "a") -> Example:
    """Return a pair of the gallery with scores and attention maps; `prediction` is the caption of the model."""
    grid = [[0.25, 0.25], [0.0, 0.0]]
    return example(record(pair_id), prediction, scores={"CIDEr": 1.375}, maps={"before": grid, "after": grid})


def page(**changes: Any) -> str:
    """Return the HTML of the report.

    `changes` replaces fields of ModelResults, or `albums`, which maps a source to the pairs of its gallery.
    """
    card = {"num_pairs": {"train": {"scenes": {"add": 7}}, "test": {"scenes": {"add": 3}}}, "num_quarantined": 11,
            "leaks": {"images": 0, "groups": 0, "near_train_images": {"scenes": {"test": 13}}, "near_bits": 3}}
    lines = [{"step": step, "loss": 1 / step, "pairs_per_s": 17.0, "seconds": step / 2} for step in range(1, 50)]
    values: dict[str, Any] = {
        "when": "now", "subtitle": "s", "params": "seed: 7  # <b>",
        "metrics": {"scenes": result()}, "gate": {"scenes": result()},
        "stress": {"scenes": stress()}, "audit": {"benchmarks": {"scenes": {"num_pairs": 3, "verdict": "clean"}}},
        "curves": {"align": lines, "tune": [*lines, {"step": 49, "val_CIDEr": 1.5}]}, "card": card,
        "albums": {"scenes": Album(shown=[pair("a red <b>cube</b> & more")])}} | changes
    albums = values.pop("albums")
    return render_page(ModelResults(**values), albums, figures(values["metrics"], values["stress"], values["curves"]))
