from __future__ import annotations

from pathlib import Path

import pytest

from onediff.config import load_params
from onediff.data.synthesis.scenes import scene_records
from onediff.eval.floors import leave_one_out, oracle
from onediff.eval.metrics import METRICS, score
from onediff.eval.protocols import checks, evaluate, protocol_of, references_digest


def test_evaluate_tells_everything_about_scenes() -> None:
    config = load_params(Path("presets/tiny.yaml"))
    rows = [vars(record) for index in range(5) for record in scene_records(config, "test", index)]
    said = {row["pair_id"]: oracle(row) if row["change_type"] != "move" else "nothing has changed" for row in rows}
    got = evaluate("scenes", said, rows, train=[text for row in rows for text in row["references"]])
    references = {row["pair_id"]: row["references"] for row in rows}
    assert {name: got[name] for name in METRICS} == score(said, references).corpus
    assert set(got["floor"]["random_train"]) == set(METRICS)
    assert got["leave_one_out"] == leave_one_out(references)
    assert got["num_pairs"] == 20 and got["by_change_type"]["none"]["num_pairs"] == 10
    assert got["change_type_accuracy"] == 0.8 and got["change_type_accuracy_by_type"]["move"] == 0
    assert (got["false_alarm_rate"], got["swap_consistency"]) == (0, 0.8)
    assert 0 < got["changed"]["CIDEr"] < got["changed"]["oracle_CIDEr"]
    mean = sum(kind["CIDEr"] * kind["num_pairs"] for kind in got["by_change_type"].values()) / 20
    assert mean == pytest.approx(got["CIDEr"])
    assert all(got["score_intervals"][name][0] < got[name] < got["score_intervals"][name][1] for name in METRICS)


def test_evaluate_reads_operations_of_edits() -> None:
    truths = [("blur", "blur the image"), ("darken", "darken the image"), ("none", "no edit was made")]
    rows = [{"pair_id": str(i), "group_id": str(i), "change_type": kind, "provenance": {}, "references": [text]}
            for i, (kind, text) in enumerate(truths)]
    said = {"0": "make the photo blurry", "1": "brighten the image", "2": ""}
    got = evaluate("edits", said, rows, train=["blur the image"])
    assert got["operation_accuracy"] == pytest.approx(1 / 3)
    assert "changed" not in got
    assert checks("edits", "blur the image", rows[0]) == {"operation": True}


def test_digest_of_references_ignores_the_order_of_pairs_only() -> None:
    one = references_digest({"a": ["x", "y"], "b": ["z"]})
    assert one == references_digest({"b": ["z"], "a": ["x", "y"]})
    assert one != references_digest({"a": ["y", "x"], "b": ["z"]})


def test_a_benchmark_of_ones_own_is_scored_against_its_own_training_captions() -> None:
    assert (protocol_of("street").train_source, protocol_of("street").name) == ("street", "coco-caption/v1")
    assert protocol_of("spot_the_diff").name == "spot_the_diff/single/v1"


def test_without_training_captions_there_are_scores_and_no_floors() -> None:
    rows = [{"pair_id": f"p{k}", "group_id": f"p{k}", "references": ["a red car left", f"the {word} is gone"],
             "change_type": "unlabelled"} for k, word in enumerate(("van", "tree", "dog"))]
    result = evaluate("street", {f"p{k}": "a red car left" for k in range(3)}, rows, train=[])
    assert (result["floor"], result["num_pairs"]) == ({}, 3)
    assert result["BLEU-4"] == pytest.approx(1)
