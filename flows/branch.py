"""The branch `retrain/<run>`: the results of a retraining that git keeps, one commit above the code that made them."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from onediff.git import CURE, git, git_paths, head

PREFIX = "retrain/"
WITHOUT_GIT = ("no git commit holds this folder: there is no branch of results, the lineage of the version names no "
               f"commit, and the promotion rule clean_lineage cannot be met. {CURE}")


def commit_results(run: str, *, remote: str | None = None) -> str | None:
    """Commits dvc.lock, and metrics and .dvc files under data/, as branch retrain/RUN; None if nothing changed or
    no commit holds this folder.

    Neither the checked-out branch nor the working tree is touched. `remote`: where it is pushed to, too.
    Raises ValueError in git's words if git refuses to read the checkout or if the branch cannot be pushed.
    """
    if head() is None:
        return None
    changed = git_paths("diff", "--relative", "--name-only", "HEAD", "--", "dvc.lock", "data")
    changed += git_paths("ls-files", "--others", "--exclude-standard", "--", "dvc.lock", "data/*.dvc")
    if not changed:
        return None
    branch = PREFIX + run
    with tempfile.TemporaryDirectory() as scratch:
        index = {"GIT_INDEX_FILE": str(Path(scratch) / "index")}
        git("read-tree", "HEAD", env=index)
        git("add", "--", *changed, env=index)
        tree = git("write-tree", env=index)
    defaults = {f"GIT_{role}_{part}": value for role in ("AUTHOR", "COMMITTER")
                for part, value in (("NAME", "OneDiff"), ("EMAIL", "onediff@localhost"))}
    commit = git("commit-tree", tree, "-p", "HEAD", "-m", f"retrain: results of run {run}", env=defaults | os.environ)
    git("update-ref", f"refs/heads/{branch}", commit)
    if remote:
        git("push", "--quiet", "--force", remote, f"refs/heads/{branch}")
    return branch
