"""Proof that a version is what it says: its commit in a scratch clone, data and weights by digest, its scores again.

The code that scores and captions is that of the commit, run in the clone. Nothing is written outside scratch.
"""

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

from onediff import paths, registry, tracking
from onediff.files import sha256_of
from onediff.git import git, head
from onediff.ops.lineage import (
    DIFFCAP,
    FOLDER,
    SCORING,
    TRAINING,
    WEIGHTS,
    lineage_of,
    stages_of,
    upstream,
    uri_of,
)
from onediff.paths import DVC_LOCK, PARAMS
from onediff.repro.lock import Stage, fetch, md5_of, md5_of_files, outs_of, read_dvc_lock

CAPTIONS, SCORED = paths.CAPTIONS.as_posix(), paths.SCORED.as_posix()
SCORES = {"test": paths.METRICS.as_posix(), "gate": paths.GATE.as_posix()}  # The score table of each split.
NUM_BATCHES = 4  # of split gate, captioned again
SAME_CAPTIONS = 0.98  # share that must be word for word the same; on the machine that made them all are


@dataclass(frozen=True)
class Check:
    """One check. `problem` says where, expected and got; it is empty if the check passed."""

    what: str
    problem: str = ""

    def __str__(self) -> str:
        return f"FAILED  {self.what}: {self.problem}" if self.problem else f"ok      {self.what}"


def verify(version: str) -> Iterator[Check]:
    """Yields each check when it is done. A check that needs something that failed before is left out.

    Raises ValueError if the version, its lineage or its commit cannot be had.
    """
    lineage = lineage_of(version)
    uri = uri_of(version)
    carried = registry.version_files(uri) / FOLDER
    stages = stages_of(lineage)
    outs = outs_of(stages)
    commit = _commit(lineage)
    tracking.HOME.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="verify-", dir=tracking.HOME) as scratch:
        clone = Path(scratch).absolute() / "clone"
        git("clone", "--quiet", "--shared", "--no-checkout", str(Path.cwd()), str(clone))
        git("checkout", "--quiet", "--detach", commit, root=clone)
        yield Check("dvc.lock and data card that the version carries",
                    next(_carried_problems(lineage, carried, stages), ""))
        yield Check(f"code at commit {commit[:12]}", "; ".join(_code_problems(lineage, stages, clone)))
        for name in (DVC_LOCK, PARAMS):
            shutil.copyfile(carried / name, clone / name)
        fetched = {}
        for path in (WEIGHTS, DIFFCAP, CAPTIONS, SCORED):
            fetched[path] = _fetch(path, outs, clone)
            yield fetched[path]
        weights = _check_weights(uri, lineage, outs, clone)
        yield weights
        yield _check_workspace(lineage, stages)
        if not fetched[DIFFCAP].problem and not fetched[CAPTIONS].problem:
            yield Check("scored again by the commit's code: the registered scores, to the last digit",
                        "; ".join(_score_again(uri, outs, clone)))
            if not weights.problem:
                yield _caption_again(registry.model_folder(uri), stages, clone, Path(scratch).absolute() / "again")


def _commit(lineage: Mapping[str, Any]) -> str:
    commit = str(lineage["git"]["commit"])
    if commit == "none":
        raise ValueError(f"version {lineage['version']} was made outside git: no commit to prove it by")
    if head() is None:
        raise ValueError(f"version {lineage['version']} was made at commit {commit}, and no git commit holds this "
                         "folder: verify the version in a clone of the repository")
    try:
        git("cat-file", "-e", f"{commit}^{{commit}}")
    except ValueError:
        branch = lineage["git"]["branch"] or "not noted"
        raise ValueError(f"version {lineage['version']} was made at commit {commit}, which is not in this repository: "
                         f"'git fetch origin' its branch ({branch}) and try again") from None
    return commit


# --- checks ----------------------------------------------------------------------------------------------------------


def _carried_problems(lineage: Mapping[str, Any], carried: Path, stages: Mapping[str, Stage]) -> Iterator[str]:
    for path, key in ((carried / DVC_LOCK, "dvc_lock"), (carried / "card.json", "data_card")):
        if not path.exists():
            yield f"{path} not found"
        elif (actual := sha256_of(path)) != lineage[key]:
            yield f"{path}: SHA-256 must be {lineage[key]}, got {actual}"
    if read_dvc_lock(carried / DVC_LOCK) != stages:
        yield f"{carried}/lineage.json names other digests than {carried / DVC_LOCK}"


def _code_problems(lineage: Mapping[str, Any], stages: Mapping[str, Stage], clone: Path) -> Iterator[str]:
    """Where the code of the commit is not the code with which the stages up to the scores ran."""
    yield from (f"{path} had changes that are in no commit" for path in lineage["git"]["dirty"])
    for name in sorted(upstream(stages, TRAINING + SCORING)):
        code = {path: md5 for path, md5 in stages[name].deps.items() if not path.startswith("data/")}
        for path, md5 in code.items():
            actual = md5_of(clone / path) if (clone / path).exists() else "nothing"
            if actual != md5:
                yield f"{path}: stage {name} ran with md5 {md5}, the commit has {actual}"


def _fetch(path: str, outs: Mapping[str, str], clone: Path) -> Check:
    if path not in outs:
        return Check(f"{path} by digest", "the version's dvc.lock has no such out")
    what = f"{path} by digest {outs[path]}"
    shutil.rmtree(clone / path, ignore_errors=True)
    try:
        fetch(outs[path], clone / path)
    except ValueError as error:
        return Check(what, str(error).removeprefix(f"{outs[path]}: "))
    return Check(what)


def _check_weights(uri: str, lineage: Mapping[str, Any], outs: Mapping[str, str], clone: Path) -> Check:
    """Compares the registered files with the digest of the version (`model_folder` does that) and with the out of
    training in dvc.lock.
    """
    what = f"registered weights are those that training left (SHA-256 {lineage['weights_digest'][:12]})"
    try:
        folder = registry.model_folder(uri)
    except ValueError as error:
        return Check(what, str(error))
    files = lineage["files"].get(WEIGHTS) or (md5_of_files(clone / WEIGHTS) if (clone / WEIGHTS).exists() else None)
    if files is None:
        return Check(what, f"nothing lists the files of {outs.get(WEIGHTS)}")
    return Check(what, "; ".join(_differences(folder, files)))


def _check_workspace(lineage: Mapping[str, Any], stages: Mapping[str, Stage]) -> Check:
    """Reads every file in the workspace of the data that the workspace's dvc.lock has under the version's digest."""
    present = _data(read_dvc_lock()) if DVC_LOCK.exists() else {}
    num_files = 0
    problems: list[str] = []
    for path, md5 in _data(stages).items():
        files = lineage["files"].get(path) if md5.endswith(".dir") else {"": md5}
        if present.get(path) == md5 and files is not None and Path(path).exists():
            num_files += len(files)
            problems += _differences(Path(path), files)
    return Check(f"{num_files} data files in this workspace", "; ".join(problems))


def _data(stages: Mapping[str, Stage]) -> dict[str, str]:
    """Path -> md5 of the deps and outs below data, without folders that contain other deps or outs."""
    md5s = {path: md5 for stage in stages.values() for path, md5 in (stage.deps | stage.outs).items()
            if path.startswith("data/")}
    return {path: md5 for path, md5 in md5s.items() if not any(other.startswith(f"{path}/") for other in md5s)}


def _differences(folder: Path, files: Mapping[str, str]) -> Iterator[str]:
    """One line for each file that is missing or whose md5 is not the listed one."""
    for name, md5 in files.items():
        path = folder / name
        if not path.exists():
            yield f"{path} is missing"
        elif (actual := md5_of(path)) != md5:
            yield f"{path}: md5 must be {md5}, got {actual}"


def _score_again(uri: str, outs: Mapping[str, str], clone: Path) -> list[str]:
    """Runs stage `score` of the commit. Returns where the scores or files differ from those of the version."""
    shutil.rmtree(clone / SCORED, ignore_errors=True)
    if failure := _run_stage("score", clone, code=clone):
        return [failure]
    problems: list[str] = []
    for split, path in SCORES.items():
        scores = tracking.flatten(json.loads((clone / path).read_text(encoding="utf-8")))
        try:
            registered = registry.version_scores(uri, split)
        except ValueError as error:  # The registered score file was changed.
            return [str(error)]
        problems += [f"{path}: {key}: the version has {registered[key]}, got {scores.get(key)}"
                     for key in sorted(registered) if registered[key] != scores.get(key)][:3]
    for path in (*SCORES.values(), SCORED):
        if not problems and (path in outs or path == SCORED) and md5_of(clone / path) != outs.get(path):
            problems.append(f"{path}: md5 must be {outs.get(path)}, got {md5_of(clone / path)}")
    return problems


def _caption_again(model: Path, stages: Mapping[str, Stage], clone: Path, again: Path) -> Check:
    """Captions some batches of split gate with the registered weights, in the same batches as the stage `caption`."""
    what = "captioned again with the registered weights"
    pair_ids = _write_sample(clone, again, stages["caption"].params["caption"]["batch_size"])
    if problem := _run_stage("caption", again, str(model.absolute()), code=clone):
        return Check(what, problem)
    before, now = ({row["pair_id"]: row["prediction"] for path in sorted((folder / CAPTIONS / "gate").glob("*.jsonl"))
                    for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())}
                   for folder in (clone, again))
    changed = [pair_id for pair_id in pair_ids if now.get(pair_id) != before.get(pair_id)]
    same = 1 - len(changed) / len(pair_ids)
    what += (f": {100 * same:.1f} % of {len(pair_ids)} pairs of split gate the same, "
             f"at least {100 * SAME_CAPTIONS:.0f} % asked")
    if same >= SAME_CAPTIONS:
        return Check(what)
    return Check(what, f"{changed[0]}: must be '{before.get(changed[0])}', got '{now.get(changed[0])}'")


def _write_sample(clone: Path, again: Path, batch_size: int) -> list[str]:
    """Writes a folder with some batches of split gate as its only data. Returns the ids of its pairs."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from onediff.data.record import shards

    table = pa.concat_tables(pq.read_table(path) for path in shards(clone / DIFFCAP, "gate-*.parquet"))
    starts = range(0, table.num_rows, batch_size)
    chosen = starts[::max(1, len(starts) // NUM_BATCHES)][:NUM_BATCHES]
    sample = pa.concat_tables(table.slice(start, batch_size) for start in chosen)
    (again / DIFFCAP).mkdir(parents=True)
    pq.write_table(sample, again / DIFFCAP / "gate-00000.parquet")
    pq.write_table(sample.slice(0, 1), again / DIFFCAP / "test-00000.parquet")  # the stage needs one
    shutil.copyfile(clone / PARAMS, again / PARAMS)
    return [str(pair_id) for pair_id in sample["pair_id"].to_pylist()]


def _run_stage(name: str, folder: Path, *arguments: str, code: Path) -> str:
    """Runs a stage of the commit in a folder. Returns why it failed, or an empty text."""
    environ = os.environ | {"PYTHONPATH": str(code), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-P", "-m", f"onediff.stages.{name}", *arguments], cwd=folder, env=environ,
                          capture_output=True, text=True, check=False)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return f"stage {name} of the commit failed: {lines[-1] if lines else 'no message'}" if done.returncode else ""
