"""The flow `stage`: one DVC stage on a worker's machine, which shares DVC's remote and this server with the sender.

It works in a git worktree of its own, so that whatever stands in the worker's clone stays as it is.
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.artifacts import Artifact
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from flows.pipeline import LOCK, dvc, outcome, outs_for, reason, small_outs
from flows.processes import DVC, alone, stream
from onediff.files import write_text
from onediff.git import git

WORK = Path(".onediff/work")
ANSWER = "onediff-stage"  # type of the artifact that carries the stage's results back


@flow(name="stage", flow_run_name="{name}")
def stage(name: str, commit: str, files: dict[str, str]) -> State[Any]:
    """Runs a stage of dvc.yaml at a commit, and pushes what it made to DVC's remote.

    `files`: dvc.lock and the metrics that git keeps, as the sender has them; an artifact hands them back, new.
    """
    try:
        with alone(WORK.with_suffix(".lock")):
            check_out(commit)
            lay(files)
            happened, answer = work(name)
    except (ValueError, OSError) as error:
        return Failed(message=f"{name}: {error}")
    Artifact(type=ANSWER, key=ANSWER, description=name, data=answer).create()
    return Completed(name=happened, message=f"{name}: {happened}")


def work(name: str) -> tuple[str, dict[str, str]]:
    """What happened (Ran, Restored, UpToDate), and the small files as they are now. Raises ValueError if it failed."""
    _bring(name)
    start = time.time()
    status, said = stream([*DVC, "repro", "--single-item", "--pull", "--allow-missing", name], WORK)
    if status:
        raise ValueError(f"failed{reason(WORK, start)}")
    dvc(WORK, "push", "--run-cache", name)
    kept = [LOCK, *small_outs(WORK)]
    return outcome(said), {str(path): (WORK / path).read_text(encoding="utf-8") for path in kept
                           if (WORK / path).exists()}


def check_out(commit: str) -> None:
    """The worktree at the commit; fetched if this clone has not seen it. Raises ValueError if it cannot be had."""
    unfetched = ""
    try:
        git("cat-file", "-e", f"{commit}^{{commit}}")
    except ValueError:
        try:
            git("fetch", "--quiet", "--all")
        except ValueError as error:  # another remote may have had the commit
            unfetched = f"{error}; "
    try:
        if (WORK / ".git").exists():
            git("checkout", "--quiet", "--force", "--detach", commit, root=WORK)
        else:
            git("worktree", "prune")
            shutil.rmtree(WORK, ignore_errors=True)
            git("worktree", "add", "--quiet", "--detach", str(WORK), commit)
    except ValueError as error:
        raise ValueError(f"{Path.cwd()}: commit {commit[:12]} cannot be checked out ({unfetched}{error}): push it to a "
                         "git remote of this clone, or 'git fetch' here") from None


def lay(files: dict[str, str]) -> None:
    """The sender's small files in the worktree, and this machine's runtime.yaml, remotes and cache."""
    for name, text in files.items():
        path = WORK / name
        if (path.is_absolute() and WORK.absolute() not in path.absolute().parents) or ".." in Path(name).parts:
            raise ValueError(f"the sender's file '{name}' lies outside the project")
        write_text(path, text)
    for name in ("runtime.yaml", ".dvc/config.local"):
        (WORK / name).unlink(missing_ok=True)
        if Path(name).exists():
            shutil.copy(name, WORK / name)
    dvc(WORK, "cache", "dir", "--local", str(Path(".dvc/cache").absolute()))


def _bring(name: str) -> None:
    """What the stage reads, in the state that dvc.lock names; what no stage makes any more goes."""
    wanted, gone = outs_for(WORK, name)
    for path in gone:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if wanted:
        dvc(WORK, "pull", "--force", "--allow-missing", *wanted)
    missing = [out for out in wanted if not (WORK / out.removesuffix(".dvc")).exists()]
    if missing:
        raise ValueError(f"{missing[0]} is not in DVC's remote, nor {len(missing) - 1} more that it reads: 'dvc push' "
                         "on the machine that made it, or remove its entry from dvc.lock")


if __name__ == "__main__":
    sys.exit("onediff: this module holds flows for deployments; 'dvc repro --single-item STAGE' runs a stage")
