"""Tests of registering a model: tags, scores, description and files of the version."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from registered import add, aliases, git, register, row, score_again, trained, write_lock

from onediff import registry, tracking


def tags(version: str = "1") -> dict[str, str]:
    return registry.version_tags(f"models:/onediff/{version}")


def test_registering_a_model_folder_again_creates_no_second_version() -> None:
    assert [add("a"), add("b"), add("a")] == ["1", "2", "1"]
    assert aliases() == {"1": ["candidate"], "2": []}


def test_registering_a_model_folder_again_replaces_its_scores() -> None:
    add("a")
    add("a", CIDEr=5.0)
    assert registry.list_versions()[0]["scores"]["scenes.CIDEr"] == 5.0
    assert registry.scored_pairs("models:/onediff/1", "gate")["scenes"]["CIDEr"] == [5.0] * 200


def test_the_tags_of_a_version_identify_code_data_and_scores() -> None:
    add("a")
    assert tags()["run_id"] == "abc" and len(tags()["git_commit"]) == 40 and len(tags()["dvc_lock"]) == 64
    assert json.loads(tags()["gate_scores"])["scenes.CIDEr"] == 3
    assert registry.version_scores("models:/onediff/1", "test")["scenes.CIDEr"] == 0.001
    assert tags()["data_validated"].startswith("no: models/a must be an output of a stage in dvc.lock")
    assert tags()["clean_lineage"] == "yes" and len(tags()) <= 16


def test_the_scores_of_a_version_are_those_of_the_score_files_without_lists() -> None:
    add("a")
    scores = registry.version_scores("models:/onediff/1", "gate")
    assert scores["scenes.floor.constant.CIDEr"] == 0.3 and "scenes.intervals.false_alarm_rate" not in scores


def test_the_model_card_is_the_description_and_notes_a_new_scoring() -> None:
    Path("carried").mkdir()
    Path("carried/README.md").write_text("---\nlanguage: en\n---\n# OneDiff\n")
    register(trained("a"), carried=Path("carried"))
    assert description() == "# OneDiff"
    for cider in (4.0, 5.0):
        score_again("1", CIDEr=cider)
        assert description().startswith("> **Scored again** on ") and description().endswith("\n\n# OneDiff")
        assert f"scenes.CIDEr {cider:g}" in description() and description().count("Scored again") == 1
    assert {key for key in tags() if key.startswith("scored_")} == {
        "scored_git_commit", "scored_git_dirty", "scored_data_digest"}
    register(trained("a", CIDEr=6.0), carried=Path("carried"))
    assert description() == "# OneDiff" and not [key for key in tags() if key.startswith("scored_")]


def description() -> str:
    return str(tracking.client().get_model_version("onediff", "1").description)


def test_new_scores_remove_the_tags_with_which_earlier_code_showed_scores() -> None:
    add("a")
    for key in ("scores_gate", "scores_test", "gate.scenes.CIDEr", "test.scenes.CIDEr"):
        tracking.client().set_model_version_tag("onediff", "1", key, "{}")
    score_again("1", CIDEr=4.0)
    assert not [key for key in tags() if key.startswith(("scores_gate", "scores_test", "gate.", "test."))]


def test_a_version_keeps_measured_figures_and_carried_files() -> None:
    Path("carried/lineage").mkdir(parents=True)
    Path("carried/lineage/lineage.json").write_text('{"a": 1}')
    Path("carried/README.md").write_text("card")
    register(trained("a"), carried=Path("carried"), measured={"caption_ms": 12.5})
    assert float(tags()["caption_ms"]) == 12.5 and float(tags()["size_mib"]) == pytest.approx(3 / 2**20, rel=1e-3)
    files = registry.version_files("models:/onediff/1")
    assert (files / "README.md").read_text() == "card" and (files / "scored/gate.json").exists()
    assert json.loads(registry.version_text("models:/onediff/1", "lineage/lineage.json")) == {"a": 1}
    with pytest.raises(FileNotFoundError, match=r"lineage/no\.json does not exist"):
        registry.version_text("models:/onediff/1", "lineage/no.json")


def test_committing_a_change_and_registering_again_makes_the_lineage_clean() -> None:
    Path("params.yaml").write_text("seed: 1\n")
    git("add", "params.yaml")
    git("commit", "-qm", "one")
    Path("params.yaml").write_text("seed: 2\n")
    add("a")
    assert tags()["clean_lineage"] == ("no: changed since the commit: params.yaml; run 'git commit', then register the "
                                       "version again")
    git("commit", "-qam", "two")
    add("a")
    assert tags()["clean_lineage"] == "yes" and tags()["git_dirty"] == "false"


def test_new_scores_that_were_interrupted_are_written_by_the_next_registration() -> None:
    add("a", CIDEr=5.0)
    tracking.client().set_model_version_tag("onediff", "1", "scores_digest", "{}")
    tracking.client().set_model_version_tag("onediff", "1", "gate_scores", "{}")
    add("a", CIDEr=5.0)
    assert json.loads(tags()["gate_scores"])["scenes.CIDEr"] == 5


def test_the_list_of_versions_contains_aliases_changes_and_refusals() -> None:
    add("a")
    registry.promote(by="flow run red-fox", why="first")
    add("b", CIDEr=1.0)
    registry.promote()
    assert row("1")["aliases"] == ["champion"]
    change, = row("1")["changes"]  # type: ignore[misc]
    assert "promote  champion - -> 1  by flow run red-fox: meets promotion.yaml: first" in change
    assert row("2")["changes"] == [] and "scenes.CIDEr is 1" in str(row("2")["refused"])


def test_a_model_without_weights_or_readable_scores_is_not_registered() -> None:
    with pytest.raises(FileNotFoundError, match=r"dvc\.lock does not exist"):
        register(Path("nowhere"))
    folder = trained("a")
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors does not exist"):
        register(Path("nowhere"))
    Path("data/gate.json").write_text("{")
    write_lock(folder)
    with pytest.raises(ValueError, match=r"data/gate\.json: must be valid JSON"):
        register(folder)


@pytest.mark.parametrize("call", [registry.promote, registry.assess, registry.rollback, registry.list_versions,
                                  registry.model_folder, registry.champion_to_score_again])
def test_the_message_about_an_empty_registry_tells_how_to_register(call) -> None:
    with pytest.raises(ValueError, match="'make run' trains and registers one"):
        call()
