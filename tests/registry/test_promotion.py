"""Tests of promotion and rollback: which version becomes champion, and which messages explain a refusal."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from registered import add, aliases, register, row, score_again, trained, write_rules

from onediff import registry
from onediff.registry import Verdict


def test_the_first_champion_is_compared_with_no_other_version() -> None:
    add("a")
    assert registry.promote() == Verdict("1", True)
    assert aliases() == {"1": ["candidate", "champion"]}


def test_a_better_candidate_replaces_the_champion() -> None:
    add("a")
    registry.promote()
    add("b", CIDEr=3.5)
    verdict = registry.promote()
    assert verdict == Verdict("2", True, "1") and verdict.figures["scenes.CIDEr"] == 3.5
    assert aliases() == {"1": ["previous"], "2": ["candidate", "champion"]}


def test_assess_returns_the_verdict_of_promote_and_changes_nothing() -> None:
    add("a")
    assert registry.assess() == Verdict("1", True)
    assert aliases() == {"1": ["candidate"]} and len(registry.trail()) == 1


def test_a_refused_candidate_gets_every_reason_and_the_champion_stays() -> None:
    add("a")
    registry.promote()
    add("b", change_type_accuracy=0.6, false_alarm_rate=0.3, CIDEr=3.0)
    verdict = registry.promote()
    assert not verdict.promoted
    assert verdict.reasons == ["scenes.change_type_accuracy is 0.6, must be at least 0.7",
                               "scenes.false_alarm_rate is 0.3, must be at most 0.06",
                               "scenes.CIDEr is 3, the champion's 3: the 95 % interval of the difference, +0 to +0, "
                               "must be above +0"]
    assert str(row("2")["refused"]).endswith("; ".join(verdict.reasons))
    assert aliases() == {"1": ["champion"], "2": ["candidate"]}


def test_scores_with_other_references_are_not_compared() -> None:
    add("a")
    registry.promote()
    add("b", CIDEr=9.0, references="r2")
    assert registry.champion_to_score_again() == "models:/onediff/1"
    assert "flows.evaluate models:/onediff/1" in registry.promote().reasons[0]
    score_again("1", references="r2")
    assert registry.champion_to_score_again() is None
    assert registry.promote("2").promoted


def test_no_version_is_scored_again_if_there_is_no_other_champion() -> None:
    add("a")
    assert registry.champion_to_score_again() is None
    registry.promote()
    assert registry.champion_to_score_again() is None


def test_a_champion_without_scores_of_its_pairs_must_be_scored_again() -> None:
    add("a")
    registry.promote()
    next(path for path in Path("mlflow-artifacts").rglob("scored/gate.json")).unlink()
    add("b", CIDEr=4.0)
    assert "score it again" in registry.promote().reasons[0]
    assert registry.champion_to_score_again() == "models:/onediff/1"


def test_promoting_the_champion_again_changes_nothing() -> None:
    add("a")
    registry.promote()
    before = registry.list_versions(), registry.trail()
    assert registry.promote().promoted and (registry.list_versions(), registry.trail()) == before


def test_proposing_the_same_version_again_writes_no_record() -> None:
    add("a")
    add("a")
    registry.propose("1")
    assert [change.action for change in registry.trail()] == ["propose"]
    with pytest.raises(ValueError, match="version 7 of 'onediff' is not registered"):
        registry.propose("7")


def test_rollback_makes_the_previous_version_champion_again() -> None:
    for name, score in (("a", 3.0), ("b", 3.5), ("c", 4.0)):
        add(name, CIDEr=score)
        registry.promote()
    assert [registry.rollback(why="it lies"), registry.rollback()] == ["2", "1"]
    assert aliases() == {"1": ["champion"], "2": [], "3": ["candidate"]}
    assert registry.trail()[-2].figures["scenes.CIDEr"] == 3.5  # The scores with which version 2 became champion.
    assert [change.why for change in registry.trail()[-2:]] == ["from version 3: it lies", "from version 2"]
    with pytest.raises(ValueError, match="has the alias previous"):
        registry.rollback()


def test_a_rollback_works_even_if_the_promotion_rules_are_invalid() -> None:
    for name, score in (("a", 3.0), ("b", 3.5)):
        add(name, CIDEr=score)
        registry.promote()
    Path("mlflow/promotion.yaml").write_text("minima: [")
    assert registry.rollback() == "1"


def test_a_version_that_was_rolled_back_is_promoted_again_only_by_its_number() -> None:
    for name, score in (("a", 3.0), ("b", 3.5)):
        add(name, CIDEr=score)
        registry.promote()
    registry.rollback()
    assert "a rollback on" in registry.promote().reasons[0]
    assert registry.promote("2").promoted
    assert row("2")["refused"] == ""


def test_a_version_whose_files_are_missing_does_not_become_champion() -> None:
    add("a")
    registry.promote()
    add("b", CIDEr=3.5)
    path, = (path for path in Path("mlflow-artifacts").rglob("model.safetensors") if path.read_bytes() == b"b")
    path.write_bytes(b"c")
    with pytest.raises(ValueError, match=r"version 2: the files in .* were changed"):
        registry.promote()
    path.unlink()
    with pytest.raises(ValueError, match=r"version 2: its files must be in the store .*train and register"):
        registry.promote()
    assert aliases() == {"1": ["champion"], "2": ["candidate"]}


def test_a_rollback_to_a_version_with_missing_files_keeps_the_champion() -> None:
    for name, score in (("a", 3.0), ("b", 3.5)):
        add(name, CIDEr=score)
        registry.promote()
    next(path for path in Path("mlflow-artifacts").rglob("model.safetensors") if path.read_bytes() == b"a").unlink()
    with pytest.raises(ValueError, match="version 1: its files must be in the store"):
        registry.rollback()
    assert aliases() == {"1": ["previous"], "2": ["candidate", "champion"]}


def test_an_unknown_metric_in_the_rules_is_reported_before_the_version_is_checked() -> None:
    add("a")
    write_rules(Path("mlflow/promotion.yaml"), minima={"scenes.CIDer": 1, "birds.CIDEr": 1})
    with pytest.raises(ValueError, match=r"promotion.yaml: minima.scenes.CIDer: the gate .*; did you mean 'CIDEr'"):
        registry.promote()
    assert row("1")["refused"] == ""


def test_limits_and_required_facts_can_refuse_a_version() -> None:
    register(trained("a"), measured={"caption_ms": 70.0})
    write_rules(Path("mlflow/promotion.yaml"), max_caption_ms=50, max_size_mib=1e-6, require=["data_validated"])
    verdict = registry.promote()
    assert verdict.reasons[0] == "caption_ms is 70, must be at most 50 ms a pair"
    assert re.fullmatch(r"size_mib is 2.*e-06, must be at most 1e-06 MiB", verdict.reasons[1])
    assert verdict.reasons[2].startswith("data_validated: no: models/a must be an output")


def test_messages_contain_the_missing_alias_or_version() -> None:
    add("a")
    with pytest.raises(ValueError, match="no version of 'onediff' has the alias champion"):
        registry.rollback()
    with pytest.raises(ValueError, match="version 7 of 'onediff' is not registered; registered versions: 1"):
        registry.promote("7")
    with pytest.raises(ValueError, match="no version of 'onediff' has the alias champion"):
        registry.model_folder()
    with pytest.raises(ValueError, match="the address of a version must look like"):
        registry.model_folder("models:/other@champion")
