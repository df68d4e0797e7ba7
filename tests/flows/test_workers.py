"""Tests of stages that run on other machines: two clones share only a DVC remote and exchange small files."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from ruamel.yaml import YAML
from sftp import sftp_server

from flows import pipeline, stage
from flows.processes import DVC
from flows.retrain import commit_results

ROOT = Path(__file__).resolve().parents[2]
DVC_YAML = """
stages:
  make:
    matrix: {source: [one]}
    cmd: python -c "open('data/made/one.txt', 'w').write(open('code.txt').read())"
    meta: {needs: cpu}
    deps: [code.txt]
    outs: ['data/made/${item.source}.txt']
  count:
    cmd: python -c "import json; json.dump(len(open('data/made/one.txt').read()), open('data/count.json', 'w'))"
    meta: {needs: gpu}
    deps: [data/made]
    metrics: [data/count.json: {cache: false}]
"""


@pytest.fixture
def clones(tmp_path: Path) -> tuple[Path, Path, str]:
    """Two clones that share a DVC remote but have no git remote, and their commit."""
    base = tmp_path / "base"
    (base / "data/made").mkdir(parents=True)
    (base / "dvc.yaml").write_text(DVC_YAML)
    (base / "code.txt").write_text("four")
    (base / ".gitignore").write_text("/.onediff/\n")
    _run(base, "git", "init", "-q", "-b", "main")
    _run(base, *DVC, "init", "-q")
    (base / "data/made/.gitignore").write_text("/one.txt\n")
    _commit(base)
    for name in ("first", "second"):
        _run(tmp_path, "git", "clone", "-q", str(base), name)
        _run(tmp_path / name, "git", "remote", "remove", "origin")
        _run(tmp_path / name, *DVC, "remote", "add", "-q", "--local", "-d", "shared", str(tmp_path / "remote"))
    return tmp_path / "first", tmp_path / "second", _run(base, "git", "rev-parse", "HEAD").strip()


def _run(folder: Path, *command: str) -> str:
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


def _commit(folder: Path) -> None:
    _run(folder, "git", "add", "-A")
    _run(folder, "git", "-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "-qm", "all")


def _work(folder: Path, name: str, commit: str, files: dict[str, str],
          patch: pytest.MonkeyPatch) -> tuple[str, dict[str, str]]:
    """Run a stage like a worker in the clone `folder`; return the outcome and the small files that it hands back."""
    patch.chdir(folder)
    stage.check_out(commit)
    stage.write_inputs(files)
    return stage.run_stage(name)


def test_a_stage_reads_outputs_of_another_machine_and_hands_back_small_files(
        clones: tuple[Path, Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, commit = clones
    outcome, files = _work(first, "make@one", commit, {}, monkeypatch)
    assert outcome == "Ran" and files.keys() == {"dvc.lock"}
    outcome, files = _work(second, "count", commit, files, monkeypatch)
    assert outcome == "Ran" and files["data/count.json"] == "4"
    assert (second / stage.WORK / "data/made/one.txt").read_text() == "four"
    assert not (second / "dvc.lock").exists() and not (second / "data/made/one.txt").exists()
    assert _work(first, "make@one", commit, files, monkeypatch)[0] == "UpToDate"
    assert _work(first, "count", commit, files, monkeypatch)[0] == "UpToDate"


def test_two_machines_share_a_remote_over_ssh_and_a_machine_without_the_key_gets_an_error(
        clones: tuple[Path, Path, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first, second, commit = clones
    with sftp_server(tmp_path) as (port, key):
        for folder in (first, second):
            remote = ("remote", "modify", "-q", "--local", "shared")
            _run(folder, *DVC, *remote, "url", f"ssh://dvc@127.0.0.1:{port}{tmp_path}/far")
            _run(folder, *DVC, *remote, "keyfile", str(key))
        files = _work(first, "make@one", commit, {}, monkeypatch)[1]
        assert list((tmp_path / "far/files").rglob("*/*/*"))
        _run(second, *DVC, "remote", "modify", "-q", "--local", "shared", "keyfile", "/dev/null")
        with pytest.raises(ValueError, match=r"^dvc pull: .*(ermission|key|auth)"):
            _work(second, "count", commit, files, monkeypatch)
        _run(second, *DVC, "remote", "modify", "-q", "--local", "shared", "keyfile", str(key))
        assert _work(second, "count", commit, files, monkeypatch)[1]["data/count.json"] == "4"


def test_a_worker_does_not_use_outputs_that_were_made_from_other_inputs(
        clones: tuple[Path, Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, commit = clones
    files = _work(first, "make@one", commit, {}, monkeypatch)[1]
    _work(second, "count", commit, files, monkeypatch)
    (first / "code.txt").write_text("seven..")
    _commit(first)
    newer = _run(first, "git", "rev-parse", "HEAD").strip()
    _run(second, "git", "fetch", "-q", str(first), "main")
    files = _work(first, "make@one", newer, files, monkeypatch)[1]
    assert _work(second, "count", newer, files, monkeypatch)[1]["data/count.json"] == "7"


def test_a_stage_that_ran_on_another_machine_is_restored_from_the_shared_run_cache(
        clones: tuple[Path, Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, commit = clones
    _work(first, "make@one", commit, {}, monkeypatch)
    assert _work(second, "make@one", commit, {}, monkeypatch)[0] == "Restored"


def test_a_commit_that_the_clone_cannot_get_is_refused(
        clones: tuple[Path, Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(clones[0])
    with pytest.raises(ValueError, match=r"commit 123412341234 cannot be checked out .*: push it to a git remote"):
        stage.check_out("1234" * 10)


def test_the_error_about_an_object_that_the_remote_lost_contains_its_path(
        clones: tuple[Path, Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, commit = clones
    files = _work(first, "make@one", commit, {}, monkeypatch)[1]
    for path in (first.parent / "remote/files").rglob("*"):
        if path.is_file():
            path.unlink()
    with pytest.raises(ValueError, match=r"data/made/one\.txt is not in the DVC remote"):
        _work(second, "count", commit, files, monkeypatch)


def test_files_from_another_machine_may_not_be_written_outside_the_project(
        clones: tuple[Path, Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(clones[0])
    stage.check_out(clones[2])
    for name in ("../evil", "/tmp/evil", "data/../../evil"):
        with pytest.raises(ValueError, match="is outside the project folder"):
            stage.write_inputs({name: "x"})


def test_every_stage_states_whether_it_needs_a_cpu_or_a_gpu() -> None:
    listed = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["stages"]
    kinds = {name: pipeline.needs(name, ROOT) for name in listed}
    assert kinds["tune"] == kinds["align"] == "gpu" and kinds["probe"] == "cpu"
    assert set(kinds.values()) == {"cpu", "gpu"}


def test_uncommitted_code_is_not_sent_to_workers(
        clones: tuple[Path, Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    first, _, commit = clones
    monkeypatch.chdir(first)
    assert stage.commit_for_workers() == commit
    (first / "code.txt").write_text("other")
    with pytest.raises(ValueError, match=r"code.txt changed since commit .*commit the changes first"):
        stage.commit_for_workers()


def test_results_are_committed_to_a_new_branch_and_pushed(
        clones: tuple[Path, Path, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first, _, commit = clones
    files = _work(first, "make@one", commit, {}, monkeypatch)[1]
    (first / "dvc.lock").write_text(files["dvc.lock"])
    assert commit_results("r0") == "retrain/r0"
    assert _run(first, "git", "diff", "--name-only", "HEAD", "retrain/r0").split() == ["dvc.lock"]
    _run(first, "git", "add", "dvc.lock")
    _run(first, "git", "-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "-qm", "lock")
    assert commit_results("r1") is None  # The commit of the user already contains this dvc.lock.
    (first / "dvc.lock").write_text(files["dvc.lock"] + "# new\n")
    (first / "code.txt").write_text("not a result")
    head = _run(first, "git", "rev-parse", "HEAD")
    _run(tmp_path, "git", "init", "-q", "--bare", "hub")
    assert commit_results("r2", remote=str(tmp_path / "hub")) == "retrain/r2"
    assert _run(first, "git", "rev-parse", "HEAD", "retrain/r2^") == head * 2
    assert _run(first, "git", "diff", "--name-only", "HEAD", "retrain/r2").split() == ["dvc.lock"]
    assert _run(first, "git", "status", "--porcelain").split() == ["M", "code.txt", "M", "dvc.lock"]
    assert "retrain/r2" in _run(tmp_path / "hub", "git", "branch")
    with pytest.raises(ValueError, match="git push"):
        commit_results("r3", remote=str(tmp_path / "nowhere"))
