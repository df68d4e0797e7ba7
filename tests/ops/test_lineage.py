"""Tests of `onediff lineage`: what a version records, and which versions used a file."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import tiny_project
from registered import register, trained

from onediff import registry, tracking
from onediff.cli import main as cli
from onediff.ops import lineage
from onediff.repro import lock as versioned

DIFFCAP, ALIGN = "data/diffcap", "data/models/align"


@pytest.fixture(autouse=True)
def project(tiny_version: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tiny_version.parent / 'mlflow.db'}")
    monkeypatch.chdir(tiny_version)
    return tiny_version


def uses_of(item: str) -> list[tuple[str, str, bool | None]]:
    """Return for each use of an item the path, the role, and whether the workspace has equal bytes at this path."""
    uses, without_lineage = lineage.versions_of(item)
    assert without_lineage == []
    return [(use.path, use.role, use.here) for use in uses]


def test_the_lineage_contains_commit_files_parameters_data_and_runs(project: Path) -> None:
    recorded = lineage.lineage_of("candidate")
    assert recorded["git"] == {"commit": tracking.provenance()["git_commit"], "branch": "main", "dirty": []}
    assert recorded["runs"] == {"flow": "flow-7", "parent": "parent-5", "align": "run-of-align", "tune": "run-of-tune",
                             "evaluation": None}
    assert recorded["stages"]["tune"]["params"] == {"tune": {"mixture": {"scenes": 1}}}
    assert recorded["stages"]["tune"]["deps"][DIFFCAP] == versioned.md5_of(project / DIFFCAP)
    assert recorded["files"][DIFFCAP] == versioned.md5_of_files(project / DIFFCAP)
    assert recorded["dvc_lock"] == hashlib.sha256(Path("dvc.lock").read_bytes()).hexdigest()
    carried = registry.version_files("models:/onediff/1") / "lineage"
    assert {path.name for path in carried.iterdir()} == {"lineage.json", "dvc.lock", "params.yaml", "card.json"}
    assert (carried / "params.yaml").read_bytes() == Path("params.yaml").read_bytes()


def test_the_text_lists_the_stages_from_sources_to_scores() -> None:
    text = lineage.as_text(lineage.lineage_of("1"))
    assert "align run-of-align, tune run-of-tune" in text and "nothing changed since" in text
    order = [text.index(f"  {name}: from") for name in ("build", "align", "tune", "caption", "score")]
    assert order == sorted(order)


def test_a_file_that_changed_since_the_commit_is_recorded(project: Path, tmp_path: Path) -> None:
    code = Path("onediff/stages/score.py")
    before = code.read_text()
    code.write_text(before + "\n")
    try:
        lineage.write_lineage(tmp_path)
    finally:
        code.write_text(before)
    assert json.loads((tmp_path / "lineage/lineage.json").read_text())["git"]["dirty"] == ["onediff/stages/score.py"]


@pytest.mark.parametrize(("item", "expected"), [
    (DIFFCAP, (DIFFCAP, "was trained on it", True)),
    (ALIGN, (ALIGN, "was trained on it", True)),
    ("./data/../data/diffcap/train-00000.parquet", (f"{DIFFCAP}/train-00000.parquet", "was trained on it", True)),
    (f"{DIFFCAP}/val-00000.parquet", (f"{DIFFCAP}/val-00000.parquet", "chose the best step on it", True)),
    (f"{DIFFCAP}/gate-00000.parquet", (f"{DIFFCAP}/gate-00000.parquet", "was scored on it, but not trained", True)),
    ("data/synthetic/scenes/all.parquet", ("data/synthetic/scenes/all.parquet", "was trained on it", True)),
    ("0123456789abcdef0123456789abcdef", (f"{DIFFCAP}/train-00000.parquet", "was trained on it", True)),
    ("onediff/stages/train.py", ("onediff/stages/train.py", "was trained with it", True)),
    ("data/captions/gate/scenes.jsonl", ("data/captions/gate/scenes.jsonl", "has it in its lineage", True)),
])
def test_versions_are_listed_for_a_path_with_the_role_of_the_file(item: str, expected: tuple[str, str, bool]) -> None:
    assert uses_of(item) == [expected]


def test_versions_are_listed_for_a_digest(project: Path) -> None:
    shard = versioned.md5_of(project / DIFFCAP / "train-00000.parquet")
    assert uses_of(shard) == [(f"{DIFFCAP}/train-00000.parquet", "was trained on it", True)]
    weights = lineage.lineage_of("1")["weights_digest"]
    assert uses_of(weights) == [("data/models/tune/*.safetensors", "consists of it", None)]
    assert uses_of("f" * 32) == []


@pytest.mark.parametrize("item", ["nope", "data/diffcap/train-00099.parquet", "0123456789abcdef"])
def test_a_misspelt_path_or_digest_is_refused(item: str) -> None:
    with pytest.raises(ValueError, match=f"^{item} must be a path in this project, a path in dvc.lock, an md5"):
        lineage.versions_of(item)


def test_an_output_of_dvc_lock_that_no_version_used_may_be_missing_in_the_workspace(
        project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dvc.lock").write_text((project / "dvc.lock").read_text().replace(DIFFCAP, "data/other"))
    monkeypatch.chdir(tmp_path)
    assert uses_of("./data/other") == []


def test_different_bytes_under_the_same_path_are_reported(project: Path) -> None:
    shard = f"{DIFFCAP}/train-00000.parquet"
    with tiny_project.flipped(project / shard):
        assert uses_of(shard) == [(shard, "was trained on it", False)]


@pytest.fixture
def version_without_lineage(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The number of a second version, registered without lineage in a copy of the MLflow store."""
    shutil.copy(project.parent / "mlflow.db", tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.chdir(tmp_path)
    version = register(trained("other"))
    monkeypatch.chdir(project)
    return version


def test_a_version_without_lineage_is_listed_separately(version_without_lineage: str) -> None:
    message = f"version {version_without_lineage} has no lineage: .* register the model again"
    with pytest.raises(ValueError, match=message):
        lineage.lineage_of(version_without_lineage)
    uses, without_lineage = lineage.versions_of(DIFFCAP)
    assert [use.version for use in uses] == ["1"] and without_lineage == [version_without_lineage]


def test_the_command_prints_lineage_and_uses(monkeypatch: pytest.MonkeyPatch,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, expected in ((["1", "--json"], '"version": "1"'),
                                (["--of", DIFFCAP], f"was trained on it: {DIFFCAP} "),
                                (["--of", "dvc.yaml"], "no version has dvc.yaml in its lineage")):
        monkeypatch.setattr(sys, "argv", ["onediff", "lineage", *arguments])
        with pytest.raises(SystemExit):
            cli.main()
        assert expected in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["onediff", "lineage", "--of", DIFFCAP, "--verify"])
    with pytest.raises(SystemExit, match="--verify needs a model version"):
        cli.main()
    monkeypatch.setattr(sys, "argv", ["onediff", "lineage"])
    with pytest.raises(SystemExit, match="give either a model version, or the option --of"):
        cli.main()


def test_a_project_without_results_has_no_lineage(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="'dvc repro' writes it"):
        lineage.write_lineage(tmp_path / "out", root=tmp_path)
