from __future__ import annotations

from pathlib import Path

import pytest

from onediff.config import load_params
from onediff.data.synthesis.scenes.records import scene_records
from onediff.eval.analysis.behaviour import scene_behaviour
from onediff.eval.analysis.wording import own_question_scores, paraphrase_spread
from onediff.eval.floors import oracle
from onediff.eval.metrics.catalog import FAST_METRICS
from onediff.eval.metrics.compute import score

ROWS = [vars(record) for index in range(3)
        for record in scene_records(load_params(Path("presets/tiny.yaml")), "test", index)]
RIGHT = {row["pair_id"]: oracle(row) for row in ROWS}
SILENT = dict.fromkeys(RIGHT, "nothing has changed")


def test_the_scores_for_own_questions_are_the_scores_of_these_captions() -> None:
    got = own_question_scores("scenes", SILENT, ROWS)
    references = {row["pair_id"]: row["references"] for row in ROWS}
    assert {name: got[name] for name in FAST_METRICS} == score(SILENT, references, metrics=FAST_METRICS).corpus
    assert (got["num_pairs"], got["change_type_accuracy"], got["no_change_accuracy"]) == (12, 0, 1)


def test_the_spread_is_mean_lowest_and_highest_value_over_the_questions() -> None:
    asked = {"What is new?": RIGHT, "What is gone?": SILENT, "What else?": dict.fromkeys(RIGHT, "brighten the image")}
    sampled = [row["pair_id"] for row in ROWS[:8]]
    lines = [{"pair_id": key, "question": question, "prediction": captions[key]}
             for question, captions in asked.items() for key in sampled]
    got = paraphrase_spread("scenes", lines, RIGHT, ROWS)
    assert (got["num_pairs"], got["num_questions"]) == (8, 3)
    assert got["change_type_accuracy"] == {"default": 1, "mean": pytest.approx(1 / 3), "low": 0, "high": 1}
    assert got["false_alarm_rate"] == {"default": 0, "mean": pytest.approx(1 / 3), "low": 0, "high": 1}
    assert got["change_accuracy"]["default"] == scene_behaviour(RIGHT, ROWS[:8])["change_accuracy"]


def test_without_captions_of_paraphrases_there_is_no_spread() -> None:
    assert paraphrase_spread("scenes", [], RIGHT, ROWS) == {}
