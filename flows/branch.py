"""The branch `retrain/<run>`: the results of a retraining that git keeps, one commit above the code that made them."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

PREFIX = "retrain/"


def commit_results(run: str, *, remote: str | None = None) -> str | None:
    """Commits dvc.lock, and metrics and .dvc files under data/, as branch retrain/RUN; None if nothing changed.

    Neither the checked-out branch nor the working tree is touched. `remote`: where it is pushed to, too.
    Raises ValueError in git's words if it cannot be pushed.
    """
    if not _git("rev-parse", "--verify", "--quiet", "HEAD^{commit}", may_fail=True):
        return None  # no git checkout, or one without a commit
    changed = _git("diff", "--name-only", "HEAD", "--", "dvc.lock", "data").split()
    changed += _git("ls-files", "--others", "--exclude-standard", "--", "dvc.lock", "data/*.dvc").split()
    if not changed:
        return None
    branch = PREFIX + run
    with tempfile.TemporaryDirectory() as scratch:
        index = {"GIT_INDEX_FILE": str(Path(scratch) / "index")}
        _git("read-tree", "HEAD", env=index)
        _git("add", "--", *changed, env=index)
        tree = _git("write-tree", env=index)
    commit = _git("commit-tree", tree, "-p", "HEAD", "-m", f"retrain: results of run {run}")
    _git("update-ref", f"refs/heads/{branch}", commit)
    if remote:
        _git("push", "--quiet", "--force", remote, f"refs/heads/{branch}")
    return branch


def _git(*arguments: str, env: Mapping[str, str] | None = None, may_fail: bool = False) -> str:
    who = {f"GIT_{role}_{part}": value for role in ("AUTHOR", "COMMITTER")
           for part, value in (("NAME", "OneDiff"), ("EMAIL", "onediff@localhost"))}
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False,
                          env={**who, **os.environ, **(env or {}), "GIT_TERMINAL_PROMPT": "0"})
    if done.returncode and not may_fail:
        raise ValueError(f"git {arguments[0]}: {' '.join(done.stderr.split())}")
    return done.stdout.strip() if done.returncode == 0 else ""
