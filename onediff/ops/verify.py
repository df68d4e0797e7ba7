"""Proof that a version is what it says: its commit in a scratch clone, data and weights by digest, its scores again.

The code that scores and captions is that of the commit, run in the clone. Nothing is written outside scratch.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onediff import registry, tracking
from onediff.git import git, head
from onediff.ops import lineage
from onediff.ops.lineage import DIFFCAP, FOLDER, WEIGHTS
from onediff.repro import lock as versioned
from onediff.repro.lock import LOCK, Stage

CAPTIONS, SCORED = "data/captions", "data/scored"
SCORES = {"scores_test": "data/metrics.json", "scores_gate": "data/gate.json"}
NUM_BATCHES = 4  # of split gate, captioned again
SAME_CAPTIONS = 0.98  # share that must be word for word the same; on the machine that made them all are


@dataclass(frozen=True)
class Check:
    """One thing that was looked at; `problem` says what, where, expected and got, and is empty if it holds."""

    what: str
    problem: str = ""

    def __str__(self) -> str:
        return f"FAILED  {self.what}: {self.problem}" if self.problem else f"ok      {self.what}"


def verify(version: str, *, root: Path = Path()) -> Iterator[Check]:
    """Checks one after the other, as they are done; those that a failure makes impossible are not tried.

    Raises ValueError if the version, its lineage or its commit cannot be had.
    """
    found = lineage.told(version)
    carried = registry.version_files(lineage.uri_of(version)) / FOLDER
    stages = {name: Stage(**stage) for name, stage in found["stages"].items()}
    outs = versioned.outs_of(stages)
    commit = _commit(found, root)
    tracking.HOME.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="verify-", dir=tracking.HOME) as scratch:
        clone = _clone(commit, Path(scratch).absolute() / "clone", root=root.absolute())
        yield _carried(found, carried, stages)
        yield _code(found, stages, clone)
        shutil.copyfile(carried / LOCK, clone / LOCK)
        shutil.copyfile(carried / "params.yaml", clone / "params.yaml")
        fetched = {}
        for path in (WEIGHTS, DIFFCAP, CAPTIONS, SCORED):
            fetched[path] = _fetched(path, outs, clone, root)
            yield fetched[path]
        weights = _weights(version, found, outs, clone)
        yield weights
        yield _workspace(found, stages, root)
        if not fetched[DIFFCAP].problem and not fetched[CAPTIONS].problem:
            yield _rescored(version, outs, clone)
        if not any(check.problem for check in (weights, fetched[DIFFCAP], fetched[CAPTIONS])):
            yield _recaptioned(version, stages, clone, Path(scratch).absolute() / "again")


def _commit(found: Mapping[str, Any], root: Path) -> str:
    """Raises ValueError if this repository has not got it."""
    commit = str(found["git"]["commit"])
    if commit == "none":
        raise ValueError(f"version {found['version']} was made outside git: no commit to prove it by")
    if head(root) is None:
        raise ValueError(f"version {found['version']} was made at commit {commit}, and no git commit holds this "
                         "folder: verify the version in a clone of the repository")
    try:
        git("cat-file", "-e", f"{commit}^{{commit}}", root=root)
    except ValueError:
        branch = found["git"]["branch"] or "not noted"
        raise ValueError(f"version {found['version']} was made at commit {commit}, which is not in this repository: "
                         f"'git fetch origin' its branch ({branch}) and try again") from None
    return commit


def _clone(commit: str, clone: Path, *, root: Path) -> Path:
    """The commit's files, from this repository's objects."""
    git("clone", "--quiet", "--shared", "--no-checkout", str(root), str(clone))
    git("checkout", "--quiet", "--detach", commit, root=clone)
    return clone


# --- checks ----------------------------------------------------------------------------------------------------------


def _carried(found: Mapping[str, Any], carried: Path, stages: Mapping[str, Stage]) -> Check:
    what = "dvc.lock and data card that the version carries"
    for path, key in ((carried / LOCK, "dvc_lock"), (carried / "card.json", "data_card")):
        if not path.exists():
            return Check(what, f"{path} not found")
        if lineage.digest(path) != found[key]:
            return Check(what, f"{path}: SHA-256 must be {found[key]}, got {lineage.digest(path)}")
    if versioned.locked(carried / LOCK) != stages:
        return Check(what, f"{carried}/lineage.json names other digests than {carried / LOCK}")
    return Check(what)


def _code(found: Mapping[str, Any], stages: Mapping[str, Stage], clone: Path) -> Check:
    """Whether the commit holds the very code that each stage on the way to the scores ran with."""
    what = f"code at commit {found['git']['commit'][:12]}"
    wrong = [f"{path} had changes that are in no commit" for path in found["git"]["dirty"]]
    for name in sorted(lineage.before(stages, lineage.TRAINING + lineage.SCORING)):
        for path, md5 in stages[name].deps.items():
            if path.startswith("data/"):
                continue
            got = versioned.md5_of(clone / path) if (clone / path).exists() else "nothing"
            if got != md5:
                wrong.append(f"{path}: stage {name} ran with md5 {md5}, the commit has {got}")
    return Check(what, "; ".join(wrong))


def _fetched(path: str, outs: Mapping[str, str], clone: Path, root: Path) -> Check:
    if path not in outs:
        return Check(f"{path} by digest", "the version's dvc.lock has no such out")
    what = f"{path} by digest {outs[path]}"
    shutil.rmtree(clone / path, ignore_errors=True)
    try:
        versioned.fetch(outs[path], clone / path, project=root)
    except ValueError as error:
        return Check(what, str(error).removeprefix(f"{outs[path]}: "))
    return Check(what)


def _weights(version: str, found: Mapping[str, Any], outs: Mapping[str, str], clone: Path) -> Check:
    """The registered files against the version's digest (`model_folder` does that), and against what dvc.lock says that
    training left.
    """
    what = f"registered weights are those that training left (SHA-256 {found['weights_digest'][:12]})"
    try:
        folder = registry.model_folder(lineage.uri_of(version))
    except ValueError as error:
        return Check(what, str(error))
    files = found["files"].get(WEIGHTS) or (versioned.tree(clone / WEIGHTS) if (clone / WEIGHTS).exists() else None)
    if files is None:
        return Check(what, f"nothing lists the files of {outs.get(WEIGHTS)}")
    return Check(what, "; ".join(_unlike(folder, files)))


def _workspace(found: Mapping[str, Any], stages: Mapping[str, Stage], root: Path) -> Check:
    """The files here of all data that this dvc.lock has under the same digest; what is not here is passed over."""
    here = _data(versioned.locked(root / LOCK)) if (root / LOCK).exists() else {}
    looked_at, wrong = 0, []
    for path, md5 in _data(stages).items():
        files = found["files"].get(path) if md5.endswith(".dir") else {"": md5}
        if here.get(path) == md5 and files is not None and (root / path).exists():
            looked_at += len(files)
            wrong += _unlike(root / path, files)
    return Check(f"{looked_at} data files in this workspace", "; ".join(wrong))


def _data(stages: Mapping[str, Stage]) -> dict[str, str]:
    """Path -> md5 of what goes in and comes out below data, but no folder of others."""
    known = {path: md5 for stage in stages.values() for path, md5 in (stage.deps | stage.outs).items()
             if path.startswith("data/")}
    return {path: md5 for path, md5 in known.items() if not any(other.startswith(f"{path}/") for other in known)}


def _unlike(folder: Path, files: Mapping[str, str]) -> list[str]:
    """Each file that is not there or has other bytes than listed."""
    wrong = []
    for name, md5 in files.items():
        path = folder / name
        if not path.exists():
            wrong.append(f"{path} is missing")
        elif (got := versioned.md5_of(path)) != md5:
            wrong.append(f"{path}: md5 must be {md5}, got {got}")
    return wrong


def _rescored(version: str, outs: Mapping[str, str], clone: Path) -> Check:
    what = "scored again by the commit's code: the registered scores, to the last digit"
    shutil.rmtree(clone / SCORED, ignore_errors=True)
    problem = _stage("score", clone, code=clone)
    if problem:
        return Check(what, problem)
    tags, wrong = registry.version_tags(lineage.uri_of(version)), []
    for tag, path in SCORES.items():
        got = tracking.flatten(json.loads((clone / path).read_text(encoding="utf-8")))
        noted = json.loads(tags[tag])
        wrong += [f"{path}: {key}: the version has {noted[key]}, got {got.get(key)}"
                  for key in sorted(noted) if noted[key] != got.get(key)][:3]
        if not wrong and path in outs and versioned.md5_of(clone / path) != outs[path]:
            wrong.append(f"{path}: md5 must be {outs[path]}, got {versioned.md5_of(clone / path)}")
    if not wrong and versioned.md5_of(clone / SCORED) != outs.get(SCORED):
        wrong.append(f"{SCORED}: md5 must be {outs.get(SCORED)}, got {versioned.md5_of(clone / SCORED)}")
    return Check(what, "; ".join(wrong))


def _recaptioned(version: str, stages: Mapping[str, Stage], clone: Path, again: Path) -> Check:
    """Whole batches of split gate, as they were then, captioned with the registered weights."""
    what = "captioned again with the registered weights"
    wanted = _sample(clone, again, stages["caption"].params["caption"]["batch_size"])
    problem = _stage("caption", again, str(registry.model_folder(lineage.uri_of(version)).absolute()), code=clone)
    if problem:
        return Check(what, problem)
    before, now = _said(clone / CAPTIONS), _said(again / CAPTIONS)
    other = [key for key in wanted if now.get(key) != before.get(key)]
    same = 1 - len(other) / len(wanted)
    told = (f"{what}: {100 * same:.1f} % of {len(wanted)} pairs of split gate the same, "
            f"at least {100 * SAME_CAPTIONS:.0f} % asked")
    if same >= SAME_CAPTIONS:
        return Check(told)
    return Check(told, f"{other[0]}: must be '{before.get(other[0])}', got '{now.get(other[0])}'")


def _sample(clone: Path, again: Path, size: int) -> list[str]:
    """Writes a folder with some batches of split gate as its only data, and gives the ids of its pairs."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from onediff.data.record import shards

    table = pa.concat_tables(pq.read_table(path) for path in shards(clone / DIFFCAP, "gate-*.parquet"))
    starts = range(0, table.num_rows, size)
    chosen = starts[::max(1, len(starts) // NUM_BATCHES)][:NUM_BATCHES]
    part = pa.concat_tables(table.slice(start, size) for start in chosen)
    (again / DIFFCAP).mkdir(parents=True)
    pq.write_table(part, again / DIFFCAP / "gate-00000.parquet")
    pq.write_table(part.slice(0, 1), again / DIFFCAP / "test-00000.parquet")  # the stage wants one
    shutil.copyfile(clone / "params.yaml", again / "params.yaml")
    return [str(key) for key in part["pair_id"].to_pylist()]


def _said(captions: Path) -> dict[str, str]:
    """pair_id -> what was said, of split gate."""
    return {line["pair_id"]: line["prediction"] for path in sorted((captions / "gate").glob("*.jsonl"))
            for line in map(json.loads, path.read_text(encoding="utf-8").splitlines())}


def _stage(name: str, folder: Path, *arguments: str, code: Path) -> str:
    """Runs a stage of the commit in a folder; why it failed, or an empty text."""
    environ = os.environ | {"PYTHONPATH": str(code), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-P", "-m", f"onediff.stages.{name}", *arguments], cwd=folder, env=environ,
                          capture_output=True, text=True, check=False)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return f"stage {name} of the commit failed: {lines[-1] if lines else 'no message'}" if done.returncode else ""
