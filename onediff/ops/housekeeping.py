"""What may go: old branches, runs, checkpoints, copies and cached data that no registered version needs.

`survey` only looks; `sweep` removes what a survey found. A version needs what its dvc.lock (kept with it in `lineage/`)
names, the runs that it or its lineage names with their whole families, and, if an alias points at it, its copy here.
"""

from __future__ import annotations

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
from onediff.registry import NAME, retention
from onediff.registry.artifacts import copies_of
from onediff.registry.retention import Registered
from onediff.train.status import read_status

Kind = Literal["scratch", "copy", "branch", "run", "data"]
KINDS: dict[Kind, str] = {
    "scratch": "checkpoints of runs that ended, and what `flows.evaluate` left",
    "copy": "copies of versions without an alias, fetched again when asked for",
    "branch": "branches retrain/* that no version names",
    "run": "MLflow runs, with their artifacts, that no version refers to",
    "data": "objects of the DVC cache that neither the workspace, nor a branch or tag, nor a version needs"}
LINEAGE = "lineage"  # folder of a version
_DIGEST = re.compile(r"\bmd5: '?([0-9a-f]{32}(?:\.dir)?)\b")
_RUN = re.compile(r"\b[0-9a-f]{32}\b")


@dataclass(frozen=True)
class Item:
    kind: Kind
    name: str
    num_bytes: int


@dataclass
class Survey:
    """`items` may go. `refused`: what was not looked at, and why."""

    items: list[Item] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def names(self, kind: Kind) -> list[str]:
        return [item.name for item in self.items if item.kind == kind]


def survey(days: float) -> Survey:
    """What may go: older than `days`, or, in the DVC cache, whatever nobody needs. Removes nothing.

    Raises ValueError if MLflow cannot say which versions there are: then nothing is known to be unneeded.
    """
    versions, found = retention.registered(), Survey()
    ours = [version for version in versions if version.model == NAME]
    found.items += [*_scratch(days), *_copies(days, ours)]
    lineages = _lineages(ours, found)
    if found.refused:
        found.refused.append("branches, MLflow runs and the DVC cache stay as they are until such a version is "
                             "registered again or deleted")
        return found
    said = "\n".join([*lineages, *(text for version in versions for text in (*version.tags.values(),
                                                                            version.run_id or ""))])
    found.items += _branches(days, said)
    found.items += [Item("run", run.id, run.num_bytes) for run in retention.old_runs(days, set(_RUN.findall(said)))]
    _data(found, set(_DIGEST.findall(said)))
    return found


def sweep(found: Survey) -> list[str]:
    """Removes what the survey found. Gives the runs that a server has only marked as deleted."""
    for name in (*found.names("scratch"), *found.names("copy")):
        shutil.rmtree(name)
    for name in found.names("branch"):
        git("branch", "-D", name)
    for name in found.names("data"):
        Path(name).unlink(missing_ok=True)
    runs = found.names("run")
    return [] if not runs or retention.remove_runs(runs) else runs


def _scratch(days: float) -> list[Item]:
    """Runs that nobody holds and that have not changed for so long."""
    root = Path(load_runtime().scratch)
    ended = [path.parent for path in sorted(root.glob("*/status.json")) if not _is_held(path.parent)]
    beside = [path for path in [tracking.HOME / "evaluate"] if path.is_dir()]
    return [Item("scratch", str(folder), _num_bytes(folder)) for folder in (*ended, *beside) if _age(folder) > days]


def _is_held(folder: Path) -> bool:
    """Whether a process trains there: on this machine it holds the lock; on another, its status was written lately."""
    if not (folder / "lock").exists():
        return read_status(folder)["state"] == "running" and _age(folder) < 1
    with (folder / "lock").open("r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _copies(days: float, versions: Iterable[Registered]) -> list[Item]:
    wanted = {name for version in versions if version.aliases for name in copies_of(version.tags)}
    return [Item("copy", str(folder), _num_bytes(folder)) for folder in sorted((tracking.HOME / "models").glob("*"))
            if folder.is_dir() and folder.name not in wanted and _age(folder) > days]


def _branches(days: float, said: str) -> list[Item]:
    """`said`: all that versions say; it may name a branch, or a commit that only that branch holds."""
    if head() is None:
        return []
    listed = git("for-each-ref", "--format=%(refname:short) %(committerdate:unix) %(HEAD)", "refs/heads/retrain/")
    items = []
    for line in listed.splitlines():
        name, when, *current = line.split()
        wanted = any(text in said for text in (name, *git("rev-list", name, "--not", "HEAD").split()))
        if time.time() - int(when) > days * 86400 and not current and not wanted:
            items.append(Item("branch", name, 0))
    return items


def _lineages(versions: Iterable[Registered], found: Survey) -> list[str]:
    """The texts that each version carries about itself; one that carries no dvc.lock is told in `refused`."""
    texts: list[str] = []
    for version in versions:
        try:
            carried = retention.carried(version, LINEAGE)
        except ValueError as error:
            found.refused.append(str(error))
            continue
        if not _DIGEST.search(carried.get("dvc.lock", "")):
            found.refused.append(f"version {version.version} of '{version.model}': its {LINEAGE}/ holds no dvc.lock")
        texts += carried.values()
    return texts


def _data(found: Survey, needed: set[str]) -> None:
    """Asks `dvc gc` what it would remove. A cache that other clones share is left alone: they need what we do not."""
    if not Path(".dvc").is_dir():
        raise FileNotFoundError(f"{Path('.dvc').absolute()} not found: run this in the project's folder")
    cache = Path(_dvc("cache", "dir").strip())
    if not cache.resolve().is_relative_to(Path(".dvc").resolve()):
        found.refused.append(f"DVC cache {cache} lies outside this project, so others may share it: clean it by "
                             "'dvc gc --projects' with all of them")
        return
    if not (cache / "files").exists():
        return
    with tempfile.TemporaryDirectory() as scratch:
        _needing(Path(scratch), needed, cache)
        branches = ["--all-branches", "--all-tags"] if head() else []
        said = _dvc("gc", "--workspace", *branches, "--projects", scratch, "--force", "--dry")
    gone = [Path(line.removeprefix("Removing ")) for line in said.splitlines() if line.startswith("Removing ")]
    found.items += [Item("data", str(path), path.stat().st_size) for path in gone if path.exists()]


def _needing(folder: Path, digests: set[str], cache: Path) -> None:
    """A DVC project that needs just these objects. With our cache: it must read a folder's list to know its files."""
    (folder / ".dvc").mkdir()
    (folder / ".dvc/config").write_text(f"[core]\n    no_scm = true\n[cache]\n    dir = {cache}\n")
    # Quoted, for a digest may look like a number: 12e4.
    outs = "".join(f"- {{md5: '{digest}', hash: md5, path: '{digest}'}}\n" for digest in sorted(digests))
    (folder / "versions.dvc").write_text(f"outs:\n{outs}" if outs else "outs: []\n")


def _dvc(*arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", "dvc", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"dvc {arguments[0]}: {' '.join(done.stderr.split())[-300:]}")
    return done.stdout


def _num_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def _age(folder: Path) -> float:
    """Days since anything in it changed."""
    last = max((path.lstat().st_mtime for path in (folder, *folder.rglob("*"))), default=0.0)
    return (time.time() - last) / 86400
