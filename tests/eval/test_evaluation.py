from __future__ import annotations

from pathlib import Path

import pytest

from onediff.config import load_params
from onediff.data.synthesis.scenes.records import scene_records
from onediff.eval.evaluation import checks, evaluate, language
from onediff.eval.floors import leave_one_out, oracle
from onediff.eval.metrics.catalog import METRICS
from onediff.eval.metrics.compute import score


def test_evaluate_returns_all_scores_and_behaviour_figures_of_scenes() -> None:
    config = load_params(Path("presets/tiny.yaml"))
    rows = [vars(record) for index in range(5) for record in scene_records(config, "test", index)]
    predictions = {row["pair_id"]: oracle(row) if row["change_type"] != "move" else "nothing has changed"
                   for row in rows}
    nearest = {row["pair_id"]: row for row in rows}
    got = evaluate("scenes", predictions, rows, train=rows, nearest=nearest)["scenes"]
    references = {row["pair_id"]: row["references"] for row in rows}
    assert {name: got[name] for name in METRICS} == score(predictions, references).corpus
    assert set(got["floor"]["random_train"]) == set(METRICS)
    assert got["floor"]["nearest_train"]["BLEU-4"] == pytest.approx(1)
    assert 1 < got["language"]["words"] < 15 and 0 < got["language"]["copied"] < 1
    assert got["leave_one_out"] == leave_one_out(references)
    assert got["num_pairs"] == 20 and got["by_change_type"]["none"]["num_pairs"] == 10
    assert got["change_type_accuracy"] == 0.8 and got["change_type_accuracy_by_type"]["move"] == 0
    assert (got["false_alarm_rate"], got["swap_consistency"]) == (0, 0.8)
    assert 0 < got["changed"]["CIDEr"] < got["changed"]["oracle_CIDEr"]
    mean = sum(kind["CIDEr"] * kind["num_pairs"] for kind in got["by_change_type"].values()) / 20
    assert mean == pytest.approx(got["CIDEr"])
    assert all(got["score_intervals"][name][0] < got[name] < got["score_intervals"][name][1] for name in METRICS)


def test_evaluate_returns_the_share_of_right_operations_of_edits() -> None:
    truths = [("blur", "blur the image"), ("darken", "darken the image"), ("none", "no edit was made")]
    rows = [{"pair_id": str(i), "group_id": str(i), "change_type": kind, "provenance": {}, "references": [text]}
            for i, (kind, text) in enumerate(truths)]
    predictions = {"0": "make the photo blurry", "1": "brighten the image", "2": ""}
    got = evaluate("edits", predictions, rows, train=rows[:1])["edits"]
    assert got["operation_accuracy"] == pytest.approx(1 / 3)
    assert "changed" not in got
    assert checks("edits", "blur the image", rows[0]) == {"operation": True}


def test_without_training_captions_there_are_scores_but_no_trivial_baselines() -> None:
    rows = [{"pair_id": f"p{k}", "group_id": f"p{k}", "references": ["a red car left", f"the {word} is gone"],
             "change_type": "unlabelled"} for k, word in enumerate(("van", "tree", "dog"))]
    predictions = {f"p{k}": "a red car left" for k in range(3)}
    result = evaluate("street", predictions, rows, train=[])["street"]
    assert (result["floor"], result["num_pairs"]) == ({}, 3)
    assert result["BLEU-4"] == pytest.approx(1)


def test_clevr_change_has_three_tables_with_document_frequencies_of_all_pairs() -> None:
    rows = [{"pair_id": f"p{k}", "group_id": f"p{k // 2}", "change_type": "none" if k % 2 else "color",
             "references": ["nothing changed", "no change"] if k % 2 else [f"the {word} cube is blue"]}
            for k, word in enumerate(["red", "red", "green", "green", "metal", "metal"])]
    predictions = {row["pair_id"]: "the red cube is blue" if row["change_type"] == "color" else "no change"
                   for row in rows}
    got = evaluate("clevr_change", predictions, rows, train=rows)
    assert list(got) == ["clevr_change/total", "clevr_change/semantic", "clevr_change/distractor"]
    assert [table["num_pairs"] for table in got.values()] == [6, 3, 3]
    items = score(predictions, {row["pair_id"]: row["references"] for row in rows}).items["CIDEr"]
    assert got["clevr_change/semantic"]["CIDEr"] == pytest.approx(sum(items[::2]) / 3)
    assert got["clevr_change/distractor"]["CIDEr"] == pytest.approx(sum(items[1::2]) / 3)
    alone = score({key: predictions[key] for key in ("p0", "p2", "p4")},
                  {row["pair_id"]: row["references"] for row in rows[::2]}).corpus
    for name in ("BLEU-4", "METEOR", "ROUGE-L"):  # These metrics use no document frequencies, unlike CIDEr.
        assert got["clevr_change/semantic"][name] == pytest.approx(alone[name], abs=1e-9)
    changed = {key: predictions[key] for key in ("p0", "p2")}
    only = evaluate("clevr_change", changed, [rows[0], rows[2]], train=[])
    assert list(only) == ["clevr_change/total", "clevr_change/semantic"]


def test_both_protocols_of_spot_the_diff_give_different_scores() -> None:
    rows = [{"pair_id": word, "group_id": word, "change_type": "unlabelled",
             "references": [f"the {word} left", "", f"a {word} came back"]} for word in ("van", "dog", "cat")]
    predictions = {row["pair_id"]: row["references"][0] for row in rows}
    got = evaluate("spot_the_diff", predictions, rows, train=rows)
    assert list(got) == ["spot_the_diff/single", "spot_the_diff/multi"]
    single, multi = got.values()
    assert single["BLEU-1"] > multi["BLEU-1"] and single["references"] != multi["references"]
    joined = {row["pair_id"]: [f"{row['references'][0]} {row['references'][2]}"] for row in rows}
    assert multi["BLEU-1"] == score(predictions, joined).corpus["BLEU-1"]


def test_length_variety_and_share_of_captions_copied_from_training() -> None:
    got = language(["The red cube", "the red  cube", "a ball left", ""], ["the red cube", "it rained"])
    assert got == {"words": 9 / 4, "vocabulary": 6, "different": 3 / 4, "distinct_1": 6 / 9, "distinct_2": 4 / 6,
                   "empty": 1 / 4, "copied": 2 / 4}


def test_one_sentence_for_all_pairs_has_no_variety() -> None:
    got = language(["nothing has changed"] * 50, [])
    assert (got["different"], got["distinct_1"]) == (1 / 50, pytest.approx(3 / 150)) and "copied" not in got
