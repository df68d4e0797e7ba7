from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from onediff import registry, tracking

REPO = Path(__file__).parents[1]
GOOD = {"change_type_accuracy": 0.9, "changed_object_accuracy": 0.8, "false_alarm_rate": 0.02, "CIDEr": 3.0,
        "floor": {"constant": {"CIDEr": 0.3, "sentence": "none"}}}


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables: making them is slow, copying is not."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{path}")
        tracking.client()
    return path


@pytest.fixture(autouse=True)
def store(empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    (tmp_path / "mlflow").mkdir()
    shutil.copy(REPO / "mlflow/promotion.yaml", tmp_path / "mlflow/promotion.yaml")
    return tmp_path


def scored(folder: Path, *, cider: float, edits: float, references: str, noise: float) -> Path:
    """What 200 pairs of 50 scenes scored: around `cider`, as far apart as `noise`."""
    values = np.random.default_rng(0).normal(0, noise, (2, 200)) if noise else np.zeros((2, 200))
    names = {"pair_id": [str(k) for k in range(200)], "group_id": [str(k // 4) for k in range(200)]}
    pairs = {benchmark: {**names, "protocol": "coco-caption/v1", "references": references,
                         "CIDEr": (mean + row - row.mean()).tolist()}
             for benchmark, mean, row in zip(("scenes", "edits"), (cider, edits), values, strict=True)}
    folder.mkdir(exist_ok=True)
    (folder / "gate.json").write_text(json.dumps(pairs))
    return folder


def add(name: str, *, operation: float = 0.8, references: str = "r1", noise: float = 0, edits: float = 1.0,
        **scenes: float) -> str:
    """Registers a model folder whose weights are `name`."""
    folder = Path("models") / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(name.encode())
    (folder / "config.json").write_text("{}")
    gate = {"scenes": {**GOOD, **scenes}, "edits": {"operation_accuracy": operation, "CIDEr": edits}}
    paths = []
    for split, scores in (("test", {"scenes": {**GOOD, "CIDEr": 0.001}}), ("gate", gate)):
        paths.append(folder.parent / f"{name}-{split}.json")
        paths[-1].write_text(json.dumps(scores))
    pairs = scored(folder.parent / f"{name}-scored", cider=gate["scenes"]["CIDEr"], edits=edits, references=references,
                   noise=noise)
    return registry.register(folder, *paths, pairs, run_id="abc")


def aliases() -> dict[str, list[str]]:
    return {row["version"]: row["aliases"] for row in registry.list_versions()}


def history(version: str) -> dict[str, str]:
    return next(row["history"] for row in registry.list_versions() if row["version"] == version)


def test_the_same_weights_are_the_same_version() -> None:
    assert [add("a"), add("b"), add("a")] == ["1", "2", "1"]
    assert aliases() == {"1": ["candidate"], "2": []}


def test_the_same_weights_with_new_scores_carry_the_new_scores() -> None:
    add("a")
    add("a", CIDEr=5.0)
    assert registry.list_versions()[0]["scores"]["scenes.CIDEr"] == 5.0


def test_a_version_says_what_it_was_made_from() -> None:
    Path("dvc.lock").write_text("schema: '2.0'")
    add("a")
    tags = tracking.client().get_model_version("onediff", "1").tags
    assert tags["run_id"] == "abc" and tags["git_commit"] == "none" and len(tags["dvc_lock"]) == 64
    assert tags["gate.scenes.CIDEr"] == "3" and tags["test.scenes.CIDEr"] == "0.001"


def test_the_model_folder_of_a_version_holds_the_registered_bytes() -> None:
    add("a")
    folder = registry.model_folder("models:/onediff@candidate")
    assert (folder / "model.safetensors").read_bytes() == b"a"
    assert registry.model_folder("models:/onediff/1") == folder


def test_the_first_champion_needs_the_minima_only() -> None:
    add("a")
    assert registry.promote() == registry.Verdict("1", True)
    assert aliases() == {"1": ["candidate", "champion"]}


def test_a_better_candidate_replaces_the_champion_and_both_say_so() -> None:
    add("a")
    registry.promote()
    add("b", CIDEr=3.5)
    assert registry.promote() == registry.Verdict("2", True, "1")
    assert aliases() == {"1": ["previous"], "2": ["candidate", "champion"]}
    assert history("2")["replaced"] == "1" and history("1")["replaced_by"] == "2"


def test_a_refused_candidate_hears_every_reason_and_the_champion_stays() -> None:
    add("a")
    registry.promote()
    add("b", change_type_accuracy=0.6, false_alarm_rate=0.3, CIDEr=3.0)
    verdict = registry.promote()
    assert not verdict.promoted
    assert verdict.reasons == ["scenes.change_type_accuracy is 0.6, must be at least 0.7",
                               "scenes.false_alarm_rate is 0.3, must be at most 0.2",
                               "scenes.CIDEr is 3, the champion's 3: the 95 % interval of the difference, +0 to +0, "
                               "must be above +0"]
    assert history("2")["refused_because"] == "; ".join(verdict.reasons)
    assert aliases() == {"1": ["champion"], "2": ["candidate"]}


@pytest.mark.parametrize("value", [float("nan"), None])
def test_a_score_that_is_no_number_is_refused(value: float) -> None:
    add("a", change_type_accuracy=value, false_alarm_rate=value)
    assert len(registry.promote().reasons) == 2


def test_a_score_that_is_missing_is_refused() -> None:
    Path("strict.yaml").write_text("minima: {scenes.beauty: 0.1}\nmaxima: {}\nbetter_than_champion: null\n")
    add("a")
    assert registry.promote(rules=Path("strict.yaml")).reasons == [
        "scenes.beauty is not in the gate scores, must be at least 0.1"]


def test_scores_on_other_references_are_not_compared() -> None:
    add("a")
    registry.promote()
    add("b", CIDEr=9.0, references="r2")
    assert "flows.evaluate models:/onediff/1" in registry.promote().reasons[0]
    add("a", references="r2")  # scored again
    assert registry.promote("2").promoted


def test_a_gain_that_chance_explains_is_no_gain() -> None:
    add("a")
    registry.promote()
    add("b", CIDEr=3.1, noise=2.0)
    reason, = registry.promote().reasons
    assert re.search(r"scenes.CIDEr is 3.1, the champion's 3: .* -0.\d+ to \+0.\d+, must be above \+0", reason)
    add("c", CIDEr=3.1, noise=0.1)
    assert registry.promote().promoted


def test_a_gain_may_not_be_paid_for_on_another_benchmark() -> None:
    add("a")
    registry.promote()
    add("b", CIDEr=4.0, edits=0.4)
    assert registry.promote().reasons == ["edits.CIDEr is 0.4, the champion's 1: the 95 % interval of the difference, "
                                          "-0.6 to -0.6, must be above -0.5"]
    add("c", CIDEr=4.0, edits=0.6)
    assert registry.promote().promoted


def test_a_champion_without_scores_of_pairs_is_to_be_scored_again() -> None:
    add("a")
    registry.promote()
    found = next(Path("mlartifacts").rglob("gate.json")) if Path("mlartifacts").exists() else next(
        path for path in Path().rglob("scored/gate.json"))
    found.unlink()
    add("b", CIDEr=4.0)
    assert "score it again" in registry.promote().reasons[0]


def test_what_each_pair_scored_can_be_asked_of_a_version() -> None:
    add("a", CIDEr=2.5)
    assert registry.scored_pairs("models:/onediff@candidate", "gate")["scenes"]["CIDEr"] == [2.5] * 200
    with pytest.raises(ValueError, match=r"models:/onediff/1 has no scores of single pairs: score it again: python -m"):
        registry.scored_pairs("models:/onediff/1", "test")


def test_promoting_the_champion_again_changes_nothing() -> None:
    add("a")
    registry.promote()
    before = registry.list_versions()
    assert registry.promote().promoted and registry.list_versions() == before


def test_rollback_makes_the_previous_version_champion_again() -> None:
    for name, score in (("a", 3.0), ("b", 3.5), ("c", 4.0)):
        add(name, CIDEr=score)
        registry.promote()
    assert [registry.rollback(), registry.rollback()] == ["2", "1"]
    assert aliases() == {"1": ["champion"], "2": [], "3": ["candidate"]}
    assert history("3")["rolled_back_to"] == "2" and history("1")["reason"] == "rolled back from version 2"
    with pytest.raises(ValueError, match="is previous"):
        registry.rollback()


def test_a_version_that_was_rolled_back_comes_back_only_by_number() -> None:
    for name, score in (("a", 3.0), ("b", 3.5)):
        add(name, CIDEr=score)
        registry.promote()
    registry.rollback()
    assert "rolled back on" in registry.promote().reasons[0]
    assert registry.promote("2").promoted
    assert "rolled_back_at" not in history("2") and "refused_at" not in history("2")


@pytest.mark.parametrize("call", [registry.promote, registry.rollback, registry.list_versions, registry.model_folder])
def test_an_empty_registry_says_how_to_fill_it(call) -> None:
    with pytest.raises(ValueError, match="'make run' trains and registers one"):
        call()


def test_what_is_not_there_is_named() -> None:
    add("a")
    with pytest.raises(ValueError, match="no version of 'onediff' is champion"):
        registry.rollback()
    with pytest.raises(ValueError, match="version 7 of 'onediff' is not registered; there are: 1"):
        registry.promote("7")
    with pytest.raises(ValueError, match="no version of 'onediff' is champion"):
        registry.model_folder()
    with pytest.raises(ValueError, match="names no version"):
        registry.model_folder("models:/other@champion")


def test_missing_weights_or_unreadable_scores_register_nothing() -> None:
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors not found"):
        registry.register(Path("nowhere"), Path("t.json"), Path("g.json"), Path("s"))
    add("a")
    Path("broken.json").write_text("{")
    with pytest.raises(ValueError, match=r"broken\.json: not valid JSON"):
        registry.register(Path("models/a"), Path("models/a-test.json"), Path("broken.json"), Path("models/a-scored"))


@pytest.mark.parametrize(("text", "message"), [
    ("minima: {}\nmaxima: {}\nbetter_than_champion: null", "both empty"),
    ("minima: {a.b: high}\nmaxima: {}\nbetter_than_champion: null", "minima.a.b: .*got 'high'"),
    ("minima: {a.b: .nan}\nmaxima: {}\nbetter_than_champion: null", "minima.a.b: "),
    ("minima: {a.b: 1}\nmaxima: {a.b: 0.5}\nbetter_than_champion: null", "above its maximum"),
    ("minima: {a.b: 1}\nmaximum: {}\nbetter_than_champion: null", "maximum"),
    ("minima: {a.b: 1}\nmaxima: {}\nbetter_than_champion: {metric: a.CIDEr, margin: -1}",
     "better_than_champion.margin"),
    ("minima: {a.b: 1}\nmaxima: {}\nbetter_than_champion: {metric: a.METEOR, margin: 0}",
     "better_than_champion.metric: only CIDEr and ROUGE-L are kept for each pair"),
    ("minima: {a.b: 1}\nmaxima: {}\nbetter_than_champion: null\nnot_worse_than_champion: {a.CIDEr: -1}",
     "not_worse_than_champion.a.CIDEr"),
    ("minima: {a.b: 1}\nmaxima: {}", "better_than_champion: Field required"),
    ("minima: [", "not valid YAML"),
    ("", "the whole file"),
])
def test_wrong_rules_are_refused(text: str, message: str) -> None:
    Path("rules.yaml").write_text(text)
    with pytest.raises(ValueError, match=f"(?s)rules.yaml: .*{message}"):
        registry.load_rules(Path("rules.yaml"))


def test_the_rules_in_the_repository_are_valid() -> None:
    rules = registry.load_rules(REPO / "mlflow/promotion.yaml")
    assert rules.minima["scenes.change_type_accuracy"] == 0.7 and rules.maxima["scenes.false_alarm_rate"] == 0.2
