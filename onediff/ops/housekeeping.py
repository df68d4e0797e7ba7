"""Removal of old branches, runs, checkpoints, copies and cached data that no registered version needs.

`survey` lists what can be removed, and `sweep` removes the items of a survey. A version needs three kinds of things:
the data listed in the dvc.lock of its lineage; the MLflow runs in its tags and lineage, with all runs of the
same retraining; and its copy on this machine, if an alias points to the version.
"""

import fcntl
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from onediff import tracking
from onediff.config import load_runtime
from onediff.git import git, head
from onediff.ops.lineage import FOLDER
from onediff.registry import NAME, retention
from onediff.registry.artifacts import cached_names
from onediff.registry.store import ModelVersion
from onediff.train.status import read_status

Kind = Literal["scratch", "copy", "branch", "run", "data"]
KINDS: dict[Kind, str] = {
    "scratch": "checkpoints of runs that ended, and files of `flows.evaluate`",
    "copy": "copies of versions without an alias, which are downloaded again when needed",
    "branch": "branches retrain/* that no version refers to",
    "run": "MLflow runs, with their artifacts, that no version refers to",
    "data": "objects in the DVC cache that no workspace, branch, tag or version needs"}
_DIGEST = re.compile(r"\bmd5: '?([0-9a-f]{32}(?:\.dir)?)\b")
_RUN = re.compile(r"\b[0-9a-f]{32}\b")


@dataclass(frozen=True)
class Item:
    """One thing that can be removed: a folder, a file, a branch or a run."""

    kind: Kind
    name: str
    num_bytes: int


@dataclass
class Survey:
    """The result of `survey`: `items` can be removed; `refused` lists what was not examined, with the reason."""

    items: list[Item] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def names(self, *kinds: Kind) -> list[str]:
        """Return the names of all items in the survey that have one of these kinds."""
        return [item.name for item in self.items if item.kind in kinds]


def survey(days: float) -> Survey:
    """List what can be removed: items older than `days`, and objects in the DVC cache that nothing needs.

    Nothing is removed. If the lineage of a model version cannot be read, only checkpoints and downloaded copies of
    models are listed. Raises ValueError if MLflow cannot list the versions.
    """
    versions, surveyed = retention.registered(), Survey()
    ours = [version for version in versions if version.name == NAME]
    ended = [path.parent for path in sorted(Path(load_runtime().scratch).glob("*/status.json"))
             if not _is_held(path.parent)]
    needed_copies = {name for version in ours if version.aliases for name in cached_names(version.tags)}
    copies = [folder for folder in sorted((tracking.HOME / "models").glob("*")) if folder.name not in needed_copies]
    surveyed.items += _old_folders("scratch", [*ended, tracking.HOME / "evaluate"], days)
    surveyed.items += _old_folders("copy", copies, days)
    lineages = _lineages(ours, surveyed)
    if surveyed.refused:
        surveyed.refused.append("branches, MLflow runs and the DVC cache are not examined until each of these "
                                "versions is registered again or deleted")
        return surveyed
    needed = "\n".join([*lineages, *(text for version in versions
                                     for text in (*version.tags.values(), version.run_id or ""))])
    surveyed.items += _branches(days, needed)
    surveyed.items += [Item("run", *run) for run in retention.old_runs(days, set(_RUN.findall(needed))).items()]
    _survey_cache(surveyed, set(_DIGEST.findall(needed)))
    return surveyed


def sweep(surveyed: Survey) -> list[str]:
    """Remove the items of a survey. Return the ids of runs that an MLflow server marked as deleted but still stores."""
    for name in surveyed.names("scratch", "copy"):
        shutil.rmtree(name)
    for name in surveyed.names("branch"):
        git("branch", "-D", name)
    for name in surveyed.names("data"):
        Path(name).unlink(missing_ok=True)
    runs = surveyed.names("run")
    return [] if not runs or retention.remove_runs(runs) else runs


def _is_held(folder: Path) -> bool:
    """Return whether a process is training in this folder.

    A process on this machine holds the lock file. A process on another machine has updated the status within a day.
    """
    if not (folder / "lock").exists():
        return read_status(folder)["state"] == "running" and _days_unchanged(folder) < 1
    with (folder / "lock").open("r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _old_folders(kind: Kind, folders: Iterable[Path], days: float) -> list[Item]:
    """Return an item for each folder in which nothing changed for more than `days` days."""
    return [Item(kind, str(folder), sum(path.stat().st_size for path in folder.rglob("*")
                                        if path.is_file() and not path.is_symlink()))
            for folder in folders if folder.is_dir() and _days_unchanged(folder) > days]


def _days_unchanged(folder: Path) -> float:
    """Return the number of days since the last change of any file in the folder."""
    return (time.time() - max(path.lstat().st_mtime for path in (folder, *folder.rglob("*")))) / 86400


def _branches(days: float, needed: str) -> list[Item]:
    """Return an item for each branch retrain/* that is older than `days` days and that no model version needs.

    `needed` is the text of the tags and lineages of all versions. A branch is needed if its name, or a commit that only
    this branch contains, occurs in that text.
    """
    if head() is None:
        return []
    items = []
    for line in git("for-each-ref", "--format=%(refname:short) %(committerdate:unix) %(HEAD)",
                    "refs/heads/retrain/").splitlines():
        name, committed_s, *current = line.split()
        is_needed = any(text in needed for text in (name, *git("rev-list", name, "--not", "HEAD").split()))
        if time.time() - int(committed_s) > days * 86400 and not current and not is_needed:
            items.append(Item("branch", name, 0))
    return items


def _lineages(versions: Iterable[ModelVersion], surveyed: Survey) -> list[str]:
    """Return the contents of all text files in the lineages of the given model versions.

    A version whose lineage cannot be read or has no dvc.lock is added to the list `refused` of the survey.
    """
    texts: list[str] = []
    for version in versions:
        try:
            carried = retention.carried(version, FOLDER)
        except ValueError as error:
            surveyed.refused.append(str(error))
            continue
        if not _DIGEST.search(carried.get("dvc.lock", "")):
            surveyed.refused.append(f"version {version.version} of '{version.name}': {FOLDER}/dvc.lock does not exist")
        texts += carried.values()
    return texts


def _survey_cache(surveyed: Survey, needed: set[str]) -> None:
    """Add to the survey the objects in the DVC cache that `dvc gc` would remove, except those that a version needs.

    A cache outside of this project is not examined, because other clones may share it and need other objects.
    """
    cache = Path(_dvc("cache", "dir").strip())
    if not cache.resolve().is_relative_to(Path(".dvc").resolve()):
        surveyed.refused.append(f"DVC cache {cache} is outside of this project, so other projects may share it: run "
                                "'dvc gc --projects' with the folders of all these projects")
        return
    if not (cache / "files").exists():
        return
    with tempfile.TemporaryDirectory() as scratch:
        # `dvc gc --projects P` keeps all data that project P uses.
        # We create a temporary project P that uses the data of all registered versions, so that DVC keeps these data.
        # The temporary project has the same cache, because DVC looks up the files of a folder in the cache.
        (Path(scratch) / ".dvc").mkdir()
        (Path(scratch) / ".dvc/config").write_text(f"[core]\n    no_scm = true\n[cache]\n    dir = {cache}\n")
        # The digest is quoted, because YAML would read a digest such as 12e4 as a number.
        outs = "".join(f"- {{md5: '{digest}', hash: md5, path: '{digest}'}}\n" for digest in sorted(needed))
        (Path(scratch) / "versions.dvc").write_text(f"outs:\n{outs}" if outs else "outs: []\n")
        branches = ["--all-branches", "--all-tags"] if head() else []
        stdout = _dvc("gc", "--workspace", *branches, "--projects", scratch, "--force", "--dry")
    unneeded = [Path(line.removeprefix("Removing ")) for line in stdout.splitlines() if line.startswith("Removing ")]
    surveyed.items += [Item("data", str(path), path.stat().st_size) for path in unneeded if path.exists()]


def _dvc(*arguments: str) -> str:
    """Run DVC and return stdout. Raises ValueError with the end of stderr if the command fails."""
    done = subprocess.run([sys.executable, "-m", "dvc", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"dvc {arguments[0]}: {' '.join(done.stderr.split())[-300:]}")
    return done.stdout
