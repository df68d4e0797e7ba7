from __future__ import annotations

import json
from pathlib import Path

import pytest
from registered import add, aliases, git, register, row, trained, write_lock

from onediff import registry, tracking


def tags(version: str = "1") -> dict[str, str]:
    return registry.version_tags(f"models:/onediff/{version}")


def test_the_same_weights_are_the_same_version() -> None:
    assert [add("a"), add("b"), add("a")] == ["1", "2", "1"]
    assert aliases() == {"1": ["candidate"], "2": []}


def test_the_same_weights_with_new_scores_carry_the_new_scores() -> None:
    add("a")
    add("a", CIDEr=5.0)
    assert registry.list_versions()[0]["scores"]["scenes.CIDEr"] == 5.0
    assert registry.scored_pairs("models:/onediff/1", "gate")["scenes"]["CIDEr"] == [5.0] * 200


def test_a_version_says_what_it_was_made_from() -> None:
    add("a")
    assert tags()["run_id"] == "abc" and len(tags()["git_commit"]) == 40 and len(tags()["dvc_lock"]) == 64
    assert tags()["gate.scenes.CIDEr"] == "3" and tags()["test.scenes.CIDEr"] == "0.001"
    assert tags()["data_validated"].startswith("no: models/a is no out of a stage in dvc.lock")
    assert tags()["clean_lineage"] == "yes"


def test_a_version_keeps_what_was_measured_and_what_it_carries() -> None:
    Path("carried/lineage").mkdir(parents=True)
    Path("carried/lineage/lineage.json").write_text('{"a": 1}')
    Path("carried/README.md").write_text("card")
    register(trained("a"), carried=Path("carried"), measured={"caption_ms": 12.5})
    assert float(tags()["caption_ms"]) == 12.5 and float(tags()["size_mib"]) == pytest.approx(3 / 2**20, rel=1e-3)
    files = registry.version_files("models:/onediff/1")
    assert (files / "README.md").read_text() == "card" and (files / "scored/gate.json").exists()
    assert json.loads(registry.version_text("models:/onediff/1", "lineage/lineage.json")) == {"a": 1}
    with pytest.raises(FileNotFoundError, match=r"lineage/no\.json not found"):
        registry.version_text("models:/onediff/1", "lineage/no.json")


def test_a_change_that_is_committed_makes_the_lineage_of_the_same_weights_clean_and_it_stays_so() -> None:
    Path("params.yaml").write_text("seed: 1\n")
    git("add", "params.yaml")
    git("commit", "-qm", "one")
    Path("params.yaml").write_text("seed: 2\n")
    add("a")
    assert tags()["clean_lineage"] == "no: changed since the commit: params.yaml; 'git commit', then register again"
    git("commit", "-qam", "two")
    add("a")
    assert tags()["clean_lineage"] == "yes" and tags()["git_dirty"] == "false"


def test_one_that_died_while_writing_new_scores_writes_them_the_next_time() -> None:
    add("a", CIDEr=5.0)
    tracking.client().set_model_version_tag("onediff", "1", "scores_digest", "{}")
    tracking.client().set_model_version_tag("onediff", "1", "gate.scenes.CIDEr", "1")
    add("a", CIDEr=5.0)
    assert tags()["gate.scenes.CIDEr"] == "5"


def test_a_list_says_who_is_what_and_how_it_came() -> None:
    add("a")
    registry.promote(by="flow run red-fox", why="first")
    add("b", CIDEr=1.0)
    registry.promote()
    assert row("1")["aliases"] == ["champion"]
    change, = row("1")["changes"]  # type: ignore[misc]
    assert "promote  champion - -> 1  by flow run red-fox: meets promotion.yaml: first" in change
    assert row("2")["changes"] == [] and "scenes.CIDEr is 1" in str(row("2")["refused"])


def test_missing_weights_or_unreadable_scores_register_nothing() -> None:
    with pytest.raises(FileNotFoundError, match=r"dvc\.lock not found"):
        register(Path("nowhere"))
    folder = trained("a")
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors not found"):
        register(Path("nowhere"))
    Path("data/gate.json").write_text("{")
    write_lock(folder)
    with pytest.raises(ValueError, match=r"data/gate\.json: not valid JSON"):
        register(folder)


@pytest.mark.parametrize("call", [registry.promote, registry.assess, registry.rollback, registry.list_versions,
                                  registry.model_folder, registry.champion_to_score_again])
def test_an_empty_registry_says_how_to_fill_it(call) -> None:
    with pytest.raises(ValueError, match="'make run' trains and registers one"):
        call()
