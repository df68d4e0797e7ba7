"""Tests of the questions to git, and of commands in folders without git or inside another repository."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from flows import retrain, stage
from onediff import tracking
from onediff.git import changed_files, configure_dvc, current_branch, git, head
from onediff.ops import doctor, housekeeping, verify
from onediff.registry import facts

ROOT = Path(__file__).resolve().parent.parent
OTHER_OWNER = "GIT_TEST_ASSUME_DIFFERENT_OWNER"  # With this variable, git takes the folder for another user's.


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git repository with one commit. The test runs in this folder."""
    folder = tmp_path / "repository"
    (folder / "data").mkdir(parents=True)
    monkeypatch.chdir(folder)
    (folder / "dvc.lock").write_text("stages: {}\n")
    commit_all(folder)
    return folder


def commit_all(folder: Path) -> None:
    """Commit all files of a folder, and create the repository if necessary."""
    for arguments in (["init", "-q"], ["add", "-A"],
                      ["-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "-qm", "all"]):
        subprocess.run(["git", *arguments], cwd=folder, check=True)


def test_head_is_the_commit_that_contains_the_folder(repository: Path) -> None:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert head() == commit
    (repository / "project").mkdir()
    assert head(repository / "project") is None  # No commit contains a file of this folder yet.
    (repository / "project/code.py").write_text("")
    commit_all(repository)
    assert head(repository / "project") not in (None, commit)


def test_a_folder_without_git_or_without_a_commit_has_no_head(tmp_path: Path) -> None:
    assert head(tmp_path) is None
    git("init", "-q", root=tmp_path)
    assert head(tmp_path) is None


def test_a_broken_checkout_is_an_error(tmp_path: Path) -> None:
    (tmp_path / ".git").write_text("gitdir: /nowhere/worktrees/lost\n")
    with pytest.raises(ValueError, match="not a git repository: /nowhere/worktrees/lost"):
        head(tmp_path)


@pytest.mark.parametrize("ask", [
    lambda: retrain.commit_results("r1"), stage.commit_for_workers, lambda: stage.check_out("1234" * 10),
    tracking.provenance, changed_files, current_branch, lambda: housekeeping._branches(30, ""),
    lambda: facts._lineage(Path()),
    lambda: verify._commit({"version": "1", "git": {"commit": "1234" * 10, "branch": ""}})])
def test_users_see_the_message_of_git_if_git_refuses_to_read_the_checkout(repository: Path,
                                                                          monkeypatch: pytest.MonkeyPatch,
                                                                          ask: Callable[[], object]) -> None:
    (repository / "dvc.lock").write_text("stages: {new: {}}\n")
    monkeypatch.setenv(OTHER_OWNER, "1")
    with pytest.raises(ValueError, match=r"detected dubious ownership .* git config --global --add safe.directory"):
        ask()
    assert doctor._git().needed and "dubious ownership" in doctor._git().message


def test_the_project_works_in_a_folder_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert retrain.commit_results("r1") is None
    assert tracking.provenance()["git_commit"] == tracking.provenance()["git_dirty"] == "none"
    assert changed_files() == housekeeping._branches(30, "") == [] and current_branch() == ""
    assert not doctor._git().ok and not doctor._git().needed and "git init" in doctor._git().cure
    for ask in (stage.commit_for_workers,
                lambda: verify._commit({"version": "1", "git": {"commit": "12", "branch": ""}})):
        with pytest.raises(ValueError, match="git commit"):
            ask()


def test_results_with_any_name_are_committed_from_a_project_inside_a_repository(
        repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = repository / "my project ü"
    (project / "data").mkdir(parents=True)
    (project / "dvc.lock").write_text("old")
    (project / "code.py").write_text("old")
    commit_all(repository)
    monkeypatch.chdir(project)
    for name in ("dvc.lock", "data/größe 1.dvc", "code.py"):
        (project / name).write_text("new")
    assert retrain.commit_results("r1") == "retrain/r1"
    changed = git("-c", "core.quotepath=false", "diff", "--relative", "--name-only", "HEAD", "retrain/r1").splitlines()
    assert changed == ["data/größe 1.dvc", "dvc.lock"]
    assert changed_files() == ["code.py"]


def test_dvc_works_without_git_and_uses_git_after_git_init(tmp_path: Path) -> None:
    from dvc.repo import Repo
    from dvc.scm import Git, NoSCM, SCMError

    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc/config").write_bytes((ROOT / ".dvc/config").read_bytes())
    with pytest.raises(SCMError, match="not a git repository"):
        _ = Repo(tmp_path).scm
    configure_dvc(tmp_path)
    assert isinstance(Repo(tmp_path).scm, NoSCM)
    git("init", "-q", root=tmp_path)
    configure_dvc(tmp_path)
    assert isinstance(Repo(tmp_path).scm, Git)


def test_only_one_module_runs_git() -> None:
    """onediff/git.py distinguishes an error of git from an empty answer, which other modules once confused."""
    sources = [path for folder in ("onediff", "flows") for path in (ROOT / folder).rglob("*.py")]
    asking = [str(path.relative_to(ROOT)) for path in sources if '["git", ' in path.read_text(encoding="utf-8")]
    assert asking == ["onediff/git.py"]


