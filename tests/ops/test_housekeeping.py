"""Tests of `onediff gc`: what it removes, what it keeps, and when it refuses to remove anything."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from onediff import tracking
from onediff.ops.housekeeping import Survey, survey, sweep

OLD = time.time() - 40 * 86400
NAME = "onediff"


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The content of an empty MLflow database. It is made once, because creating the tables takes seconds."""
    folder = tmp_path_factory.mktemp("empty")
    code = "from onediff import tracking; tracking.client()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=folder, env={
        **os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"})
    return (folder / "mlflow.db").read_bytes()


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, database: bytes) -> Path:
    """A git and DVC project with its own MLflow store. The working directory of the test is this project."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mlflow.db").write_bytes(database)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    for key, value in {"AUTHOR_NAME": "a", "AUTHOR_EMAIL": "a@example.org", "COMMITTER_NAME": "a",
                       "COMMITTER_EMAIL": "a@example.org"}.items():
        monkeypatch.setenv(f"GIT_{key}", value)
    git("init", "-q", "-b", "main")
    dvc("init", "-q")
    (tmp_path / ".gitignore").write_text("/mlflow*\n/.onediff/\n")
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    commit("begin")
    return tmp_path


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True).stdout.strip()


def dvc(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "dvc", *arguments], check=True, capture_output=True)


def commit(message: str) -> str:
    git("add", "-A")
    git("commit", "-qm", message)
    return git("rev-parse", "HEAD")


def add_data(text: str) -> str:
    """Write a folder of two files and add it to DVC. Return the content of the .dvc file."""
    folder = Path("shards")
    folder.mkdir(exist_ok=True)
    (folder / "a").write_text(text)
    (folder / "b").write_text("the same in every version")
    dvc("add", "-q", "shards")
    return Path("shards.dvc").read_text()


def register(lock: str | None, **tags: str) -> None:
    """Register a version whose lineage contains this text as dvc.lock, or no dvc.lock for None."""
    store = tracking.client()
    if not store.search_registered_models():
        store.create_registered_model(NAME)
    number = len(store.search_model_versions())
    carried = Path(f"mlflow-versions/{number}/lineage")
    carried.mkdir(parents=True)
    (carried / "lineage.json").write_text("{}")
    if lock is not None:
        (carried / "dvc.lock").write_text(lock)
    store.create_model_version(NAME, carried.parent.absolute().as_uri(), tags=tags)


def objects() -> set[str]:
    """Return the contents of all files in the DVC cache."""
    return {path.read_text() for path in Path(".dvc/cache/files").rglob("*") if path.is_file()}


def age(folder: Path) -> Path:
    """Set the modification time of the folder and everything in it to 40 days ago."""
    for path in (*folder.rglob("*"), folder):
        os.utime(path, (OLD, OLD))
    return folder


def make_run(name: str, *, parent: str | None = None, started: float = OLD, status: str = "FINISHED") -> str:
    """Create an MLflow run with an artifact of 1,000 bytes, and return the id of the run.

    `started` is the start time in seconds since 1970; `parent` is the id of the run that contains this run.
    """
    tags = {"mlflow.parentRunId": parent} if parent else {}
    run = tracking.client().create_run(tracking.experiment_id(), int(started * 1000), tags, name)
    tracking.client().log_text(run.info.run_id, "x" * 1000, "a.txt")
    if status != "RUNNING":
        tracking.client().set_terminated(run.info.run_id, status)
    return str(run.info.run_id)


def test_cached_data_that_a_version_needs_is_kept_and_unneeded_data_is_removed(project: Path) -> None:
    add_data("nobody's")
    registered = add_data("a version's")
    add_data("a tag's")
    commit("tagged")
    git("tag", "v1")
    add_data("the workspace's")
    register(registered)
    assert len(objects()) == 9  # Four folder lists, four versions of file a, and one file b.
    surveyed = survey(30)
    assert surveyed.refused == [] and len(surveyed.names("data")) == 2
    assert len(objects()) == 9  # `survey` must not remove anything.
    assert sweep(surveyed) == []
    remaining = {text for text in objects() if not text.startswith("[")}
    assert remaining == {"a version's", "a tag's", "the workspace's", "the same in every version"}
    Path("shards.dvc").write_text(registered)
    dvc("checkout", "-q", "--force", "shards.dvc")
    assert Path("shards/a").read_text() == "a version's"


def test_the_cache_is_not_changed_if_a_version_has_no_dvc_lock(project: Path) -> None:
    add_data("unknown")
    add_data("the workspace's")
    register(None)
    before = objects()
    surveyed = survey(0)
    assert surveyed.refused == ["version 1 of 'onediff': lineage/dvc.lock does not exist",
                                "branches, MLflow runs and the DVC cache are not examined until each of these versions "
                                "is registered again or deleted"]
    sweep(surveyed)
    assert objects() == before


def test_a_version_whose_files_were_deleted_is_reported_by_number(project: Path) -> None:
    register("md5: '" + "0" * 32 + "'\n")
    subprocess.run(["rm", "-r", "mlflow-versions"], check=True)
    assert survey(30).refused[0].startswith("version 1 of 'onediff': its folder lineage/ cannot be read")


def test_a_cache_outside_of_the_project_is_not_examined(project: Path,
                                                        tmp_path_factory: pytest.TempPathFactory) -> None:
    dvc("cache", "dir", str(tmp_path_factory.mktemp("shared")))
    add_data("nobody's")
    add_data("the workspace's")
    surveyed = survey(0)
    assert surveyed.names("data") == [] and "is outside of this project" in surveyed.refused[0]


def test_old_runs_are_removed_with_their_artifacts_unless_their_retraining_is_needed(
        project: Path) -> None:
    old = make_run("retrain")
    child = make_run("tune", parent=old)
    parent = make_run("retrain")
    registered_run, sibling = make_run("tune", parent=parent), make_run("evaluate", parent=parent)
    register("md5: '" + "0" * 32 + "'\n", run_id=registered_run)
    young = make_run("retrain", started=time.time())
    still_running = make_run("retrain", status="RUNNING")
    surveyed = survey(30)
    assert set(surveyed.names("run")) == {old, child}
    assert all(item.num_bytes == 1000 for item in surveyed.items if item.kind == "run")
    sweep(surveyed)
    remaining = tracking.client().search_runs([tracking.experiment_id()])
    assert {run.info.run_id for run in remaining} == {parent, registered_run, sibling, young, still_running}
    assert len(list(Path("mlflow-artifacts").rglob("a.txt"))) == 5
    assert survey(30).names("run") == []


def test_old_retrain_branches_are_removed_unless_a_version_refers_to_them(project: Path,
                                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_COMMITTER_DATE", f"{int(OLD)} +0000")
    commits = {}
    for name in ("forgotten", "by_commit", "by_name"):
        git("checkout", "-q", "-b", f"retrain/{name}", "main")
        Path("dvc.lock").write_text(name)
        commits[name] = commit(name)
    git("checkout", "-q", "main")
    monkeypatch.delenv("GIT_COMMITTER_DATE")
    git("checkout", "-q", "-b", "retrain/young")
    git("commit", "-q", "--allow-empty", "-m", "young")
    git("checkout", "-q", "main")
    register("md5: '" + "0" * 32 + "'\n", git_commit=commits["by_commit"], branch="retrain/by_name")
    surveyed = survey(30)
    assert surveyed.names("branch") == ["retrain/forgotten"]
    sweep(surveyed)
    assert git("branch", "--list", "--format=%(refname:short)", "retrain/*").split() == [
        "retrain/by_commit", "retrain/by_name", "retrain/young"]


def test_old_checkpoints_and_copies_are_removed_unless_they_are_in_use(project: Path) -> None:
    scratch, copies = Path(".onediff/scratch"), Path(".onediff/models")
    for name, state in (("ended", "finished"), ("held", "running"), ("young", "failed")):
        (scratch / name).mkdir(parents=True)
        (scratch / name / "status.json").write_text(json.dumps({"state": state, "step": 1, "reason": ""}))
        (scratch / name / "lock").touch()
    for digest in ("champion", "champion-weights", "folder", "nobody"):
        (copies / digest).mkdir(parents=True)
    (scratch / "unpacked").mkdir()
    for folder in (scratch / "ended", scratch / "held", scratch / "unpacked", *copies.iterdir()):
        age(folder)
    register("md5: '" + "0" * 32 + "'\n", weights_digest="champion", model_digest="folder")
    tracking.client().set_registered_model_alias(NAME, "champion", "1")
    with (scratch / "held/lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        surveyed = survey(30)
    assert surveyed.names("scratch") == [str(scratch / "ended")] and surveyed.names("copy") == [str(copies / "nobody")]
    sweep(surveyed)
    assert sorted(path.name for path in scratch.iterdir()) == ["held", "unpacked", "young"]
    assert sorted(path.name for path in copies.iterdir()) == ["champion", "champion-weights", "folder"]


@pytest.mark.slow
def test_the_command_lists_items_and_removes_them_only_with_yes(project: Path) -> None:
    add_data("nobody's")
    add_data("the workspace's")
    before = objects()
    shown = onediff("gc")
    assert "2 data, 0.0 MB: objects in the DVC cache" in shown and "Nothing was removed yet" in shown
    assert objects() == before
    assert "removed" in onediff("gc", "--yes") and len(objects()) == len(before) - 2
    assert json.loads(onediff("gc", "--json")) == {"items": [], "refused": [], "removed": False}


def onediff(*arguments: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run([sys.executable, "-m", "onediff", *arguments], check=True, capture_output=True, text=True,
                          env=env).stdout


def test_outside_of_a_project_the_command_refuses_and_creates_nothing(tmp_path: Path) -> None:
    completed = subprocess.run([sys.executable, "-m", "onediff", "gc"], cwd=tmp_path, capture_output=True, text=True,
                               check=False, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])})
    assert completed.returncode == 1 and "dvc.yaml does not exist" in completed.stderr
    assert not list(tmp_path.iterdir())


def test_a_new_project_has_nothing_to_remove(project: Path) -> None:
    assert survey(0) == Survey()
