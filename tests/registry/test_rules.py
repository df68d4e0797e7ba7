"""Tests of mlflow/promotion.yaml: valid rules, rules that a version breaks, and comparisons with the champion."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from registered import BENCHMARK, REPO, pairs_of, write_rules

from onediff.registry import load_rules
from onediff.registry.rules import broken_rules, check_metrics, failed_comparisons, figures_of, incomparable


@pytest.mark.parametrize(("text", "message"), [
    ("minima: {}\nmaxima: {}\nbetter_than_champion: null", "both are empty"),
    ("minima: {a.b: high}\nmaxima: {}\nbetter_than_champion: null", "minima.a.b: .*got 'high'"),
    ("minima: {a.b: true}\nmaxima: {}\nbetter_than_champion: null", "minima.a.b: .*got True"),
    ("minima: {a.b: .nan}\nmaxima: {}\nbetter_than_champion: null", "minima.a.b: "),
    ("minima: {a.b: 1}\nmaxima: {a.b: 0.5}\nbetter_than_champion: null", "must not be above the maximum"),
    ("minima: {a.b: 1}\nmaximum: {}\nbetter_than_champion: null", "maximum: unknown key; did you mean 'maxima'"),
    ("minima: {a.b: 1}\nmaxima: {}\nbetter_than_champion: {metric: a.CIDEr, margin: -1}",
     "better_than_champion.margin"),
    ("minima: {a.b: 1}\nmaxima: {}\nbetter_than_champion: {metric: a.METEOR, margin: 0}",
     "better_than_champion.metric: must end with CIDEr or ROUGE-L"),
    ("minima: {a.b: 1}\nmaxima: {}\nbetter_than_champion: null\nnot_worse_than_champion: {a.CIDEr: -1}",
     "not_worse_than_champion.a.CIDEr"),
    ("minima: {a.b: 1}\nmaxima: {}", "better_than_champion: Field required"),
    ("minima: {a.b: 1}\nmaxima: {}\nbetter_than_champion: null\nmax_caption_ms: 0", "max_caption_ms: .*greater than 0"),
    ("minima: {a.b: 1}\nmaxima: {}\nbetter_than_champion: null\nrequire: [luck]", "require.0: .*'data_validated'"),
    ("minima: [", "must be valid YAML"),
    ("", "the whole file"),
])
def test_wrong_rules_are_refused(text: str, message: str) -> None:
    Path("rules.yaml").write_text(text)
    with pytest.raises(ValueError, match=f"(?s)rules.yaml: .*{message}"):
        load_rules(Path("rules.yaml"))


def test_the_rules_in_the_repository_are_valid_and_contain_known_metrics() -> None:
    rules = load_rules(REPO / "mlflow/promotion.yaml")
    check_metrics(rules, {})
    assert rules.minima["scenes.change_type_accuracy"] == 0.7 and rules.maxima["scenes.false_alarm_rate"] <= 0.1
    assert rules.require == ["data_validated", "leak_audit", "clean_lineage"]


def test_every_path_in_the_scores_is_a_known_metric() -> None:
    rules = load_rules(write_rules(Path("rules.yaml"), minima={"scenes.by_change_type.none.beauty": 0},
                                   maxima={}))
    scores = {"scenes.by_change_type.none.beauty": 1.0, "scenes.CIDEr": 1.0, "edits.CIDEr": 1.0}
    check_metrics(rules, scores)
    del scores["scenes.by_change_type.none.beauty"]
    with pytest.raises(ValueError, match=r"minima\.scenes\.by_change_type\.none\.beauty: .* no 'by_change_type\.none"):
        check_metrics(rules, scores)
    with pytest.raises(ValueError, match="no metric is called 'beauty'"):
        check_metrics(rules, {})


def test_a_metric_that_its_benchmark_does_not_have_is_an_error_of_the_file() -> None:
    rules = load_rules(write_rules(Path("rules.yaml"), minima={"edits.swap_consistency": 0.5}, maxima={}))
    with pytest.raises(ValueError, match=r"minima\.edits\.swap_consistency: the gate scores of 'edits' have no 'swap"):
        check_metrics(rules, {"scenes.swap_consistency": 0.7, "scenes.CIDEr": 1.0, "edits.CIDEr": 1.0})


@pytest.mark.parametrize("value", [float("nan"), None])
def test_a_score_that_is_not_a_number_breaks_its_rule(value: float) -> None:
    rules = load_rules(REPO / "mlflow/promotion.yaml")
    wrong = ["scenes.change_type_accuracy", "scenes.false_alarm_rate"]
    scores = dict.fromkeys(rules.minima, 1.0) | dict.fromkeys(wrong, value)
    assert [reason.partition(" ")[0] for reason in list(broken_rules(rules, scores, {}))[:2]] == wrong


def test_missing_measurements_and_facts_are_refused_with_the_cure() -> None:
    rules = load_rules(REPO / "mlflow/promotion.yaml")
    scores = {**dict.fromkeys(rules.minima, 1.0), "scenes.false_alarm_rate": 0.0}
    reasons = list(broken_rules(rules, scores, {"size_mib": "11"}))
    assert reasons == ["caption_ms was not measured, must be at most 2000 ms a pair: register the version again",
                       "data_validated: not known: register the version again",
                       "leak_audit: not known: register the version again",
                       "clean_lineage: not known: register the version again"]


def test_a_benchmark_that_was_not_scored_is_refused() -> None:
    Path("rules.yaml").write_text("minima: {birds.CIDEr: 0.1}\nmaxima: {}\nbetter_than_champion: null")
    rules = load_rules(Path("rules.yaml"))
    reason, = broken_rules(rules, {"scenes.CIDEr": 3.0}, {})
    assert reason == "birds.CIDEr is not in the gate scores, must be at least 0.1"
    assert figures_of(rules, {"scenes.CIDEr": 3.0}, {"size_mib": "11"}) == {"size_mib": 11.0}


def pairs(cider: float, *, edits: float = 1.0, references: str = "r1", noise: float = 0) -> dict[str, object]:
    """Return scores of each pair whose mean CIDEr is `cider` on the benchmark scenes and `edits` on edits."""
    return pairs_of({name: {**BENCHMARK, "references": references, "CIDEr": score}
                     for name, score in (("scenes", cider), ("edits", edits))}, noise=noise)


def reasons(candidate: dict[str, object], champion: dict[str, object]) -> list[str]:
    """Return the reasons why the scores of the candidate's pairs are not better than those of the champion's."""
    return [*failed_comparisons(load_rules(write_rules(Path("rules.yaml"))), candidate, champion, again="again")]


def test_a_gain_within_the_bootstrap_interval_is_not_enough() -> None:
    reason, = reasons(pairs(3.1, noise=2.0), pairs(3.0))
    assert re.search(r"scenes.CIDEr is 3.1, the champion's 3: .* -0.\d+ to \+0.\d+, must be above \+0", reason)
    assert reasons(pairs(3.1, noise=0.1), pairs(3.0)) == []


def test_a_gain_with_a_large_loss_on_another_benchmark_is_not_enough() -> None:
    assert reasons(pairs(4.0, edits=0.4), pairs(3.0)) == [
        "edits.CIDEr is 0.4, the champion's 1: the 95 % interval of the difference, -0.6 to -0.6, must be above -0.5"]
    assert reasons(pairs(4.0, edits=0.6), pairs(3.0)) == []


def test_scores_with_other_references_or_without_pairs_are_not_compared() -> None:
    rules = load_rules(write_rules(Path("rules.yaml")))
    assert incomparable(rules, pairs(4.0), pairs(3.0)) == []
    for champion in (pairs(3.0, references="r2"), {}):
        assert incomparable(rules, pairs(4.0), champion) == ["scenes", "edits"]
        assert reasons(pairs(4.0), champion)[0].endswith("score it again: again")
    assert reasons({}, pairs(3.0))[0] == "scenes.CIDEr is not in the scores of the pairs of split gate"
