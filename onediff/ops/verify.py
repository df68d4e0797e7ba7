"""Verification of a version: code, data and weights are compared by digest, then scores and captions are repeated.

The version's commit is checked out in a temporary clone, and the code of that commit scores and captions there.
Nothing is written outside of the temporary folder.
"""

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
from onediff.files import read_json, read_jsonl, sha256_of
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
SCORES = {"test": paths.METRICS.as_posix(), "gate": paths.GATE.as_posix()}  # the file with the scores of each split
NUM_BATCHES = 4  # number of batches of the `gate` split that are captioned again
SAME_CAPTIONS = 0.98  # required share of identical captions; other processors and GPUs round differently


@dataclass(frozen=True)
class Check:
    """The result of one check. `problem` gives place, expected and actual value; it is empty if the check passed."""

    what: str
    problem: str = ""

    def __str__(self) -> str:
        return f"FAILED  {self.what}: {self.problem}" if self.problem else f"ok      {self.what}"


def verify(version: str) -> Iterator[Check]:
    """Yield the result of each check as soon as the check ends. A check is skipped if a check that it needs failed.

    Raises ValueError if the version, its lineage or its commit does not exist.
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
        yield Check("dvc.lock and data card of the version",
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
            yield Check("scoring again with the code of the commit gives exactly the registered scores",
                        "; ".join(_score_again(uri, outs, clone)))
            if not weights.problem:
                yield _caption_again(registry.model_folder(uri), stages, clone, Path(scratch).absolute() / "again")


def _commit(lineage: Mapping[str, Any]) -> str:
    """Return the version's git commit. Raises ValueError if this repository does not contain the commit."""
    commit = str(lineage["git"]["commit"])
    if commit == "none":
        raise ValueError(f"version {lineage['version']} was trained without git, so no commit contains its code: train "
                         "and register the model in a clone")
    if head() is None:
        raise ValueError(f"version {lineage['version']} was made at commit {commit}, but this folder is not part of a "
                         "git commit: verify the version in a clone of the repository")
    try:
        git("cat-file", "-e", f"{commit}^{{commit}}")
    except ValueError:
        branch = lineage["git"]["branch"] or "not recorded"
        raise ValueError(f"version {lineage['version']} was made at commit {commit}, which this repository does not "
                         f"contain: fetch the branch of the commit ({branch}) with 'git fetch origin', then verify "
                         "again") from None
    return commit


def _carried_problems(lineage: Mapping[str, Any], carried: Path, stages: Mapping[str, Stage]) -> Iterator[str]:
    """Yield a line for each file of the version's lineage folder that does not match lineage.json."""
    for path, key in ((carried / DVC_LOCK, "dvc_lock"), (carried / "card.json", "data_card")):
        if not path.exists():
            yield f"{path} does not exist"
        elif (actual := sha256_of(path)) != lineage[key]:
            yield f"{path}: SHA-256 must be {lineage[key]}, got {actual}"
    if read_dvc_lock(carried / DVC_LOCK) != stages:
        yield f"{carried}/lineage.json has other digests than {carried / DVC_LOCK}"


def _code_problems(lineage: Mapping[str, Any], stages: Mapping[str, Stage], clone: Path) -> Iterator[str]:
    """Yield a line for each source file of the git commit that differs from the code that trained and scored."""
    yield from (f"{path} had uncommitted changes" for path in lineage["git"]["dirty"])
    for name in sorted(upstream(stages, TRAINING + SCORING)):
        code = {path: md5 for path, md5 in stages[name].deps.items() if not path.startswith("data/")}
        for path, md5 in code.items():
            actual = md5_of(clone / path) if (clone / path).exists() else "no such file"
            if actual != md5:
                yield f"{path}: stage {name} ran with md5 {md5}, the commit has {actual}"


def _fetch(path: str, outs: Mapping[str, str], clone: Path) -> Check:
    """Fetch an output of the pipeline into the clone by its digest, from DVC's cache or the default remote."""
    if path not in outs:
        return Check(f"{path} by digest", "the version's dvc.lock does not list this output")
    what = f"{path} by digest {outs[path]}"
    shutil.rmtree(clone / path, ignore_errors=True)
    try:
        fetch(outs[path], clone / path)
    except ValueError as error:
        return Check(what, str(error).removeprefix(f"{outs[path]}: "))
    return Check(what)


def _check_weights(uri: str, lineage: Mapping[str, Any], outs: Mapping[str, str], clone: Path) -> Check:
    """Compare the registered model with the digest of the version, and with the training output in dvc.lock.

    `registry.model_folder` does the first comparison and raises ValueError if the digest differs.
    """
    what = f"registered weights are the output of training (SHA-256 {lineage['weights_digest'][:12]})"
    try:
        folder = registry.model_folder(uri)
    except ValueError as error:
        return Check(what, str(error))
    files = lineage["files"].get(WEIGHTS) or (md5_of_files(clone / WEIGHTS) if (clone / WEIGHTS).exists() else None)
    if files is None:
        return Check(what, f"the list of the files in {outs.get(WEIGHTS)} does not exist, so they cannot be compared")
    return Check(what, "; ".join(_differences(folder, files)))


def _check_workspace(lineage: Mapping[str, Any], stages: Mapping[str, Stage]) -> Check:
    """Read the data files in the workspace and compare each with the md5 in the version's lineage.

    Data that has another digest in the workspace's dvc.lock belongs to another version, and is skipped.
    """
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
    """Return the md5 of each dependency and output below data/, by path.

    Folders that contain other dependencies or outputs are left out, because their files are compared one by one.
    """
    md5s = {path: md5 for stage in stages.values() for path, md5 in (stage.deps | stage.outs).items()
            if path.startswith("data/")}
    return {path: md5 for path, md5 in md5s.items() if not any(other.startswith(f"{path}/") for other in md5s)}


def _differences(folder: Path, files: Mapping[str, str]) -> Iterator[str]:
    """Yield a line for each file that is missing in the folder or whose md5 differs from the md5 in `files`."""
    for name, md5 in files.items():
        path = folder / name
        if not path.exists():
            yield f"{path} is missing"
        elif (actual := md5_of(path)) != md5:
            yield f"{path}: md5 must be {md5}, got {actual}"


def _score_again(uri: str, outs: Mapping[str, str], clone: Path) -> list[str]:
    """Run the stage `score` again with the code of the version's commit.

    Return a line for each score or score file that differs from that of the registered version.
    """
    shutil.rmtree(clone / SCORED, ignore_errors=True)
    if failure := _run_stage("score", clone, code=clone):
        return [failure]
    problems: list[str] = []
    for split, path in SCORES.items():
        scores = tracking.flatten(read_json(clone / path))
        try:
            registered = registry.version_scores(uri, split)
        except ValueError as error:  # Somebody changed the score file of the version.
            return [str(error)]
        problems += [f"{path}: {key}: the version has {registered[key]}, got {scores.get(key)}"
                     for key in sorted(registered) if registered[key] != scores.get(key)][:3]
    for path in (*SCORES.values(), SCORED):
        if not problems and (path in outs or path == SCORED) and md5_of(clone / path) != outs.get(path):
            problems.append(f"{path}: md5 must be {outs.get(path)}, got {md5_of(clone / path)}")
    return problems


def _caption_again(model: Path, stages: Mapping[str, Stage], clone: Path, again: Path) -> Check:
    """Caption some batches of the `gate` split again with the registered weights.

    Each batch has the same pairs as in stage `caption`, because the pairs in a batch affect how numbers are rounded.
    """
    what = "captioning again with the registered weights"
    pair_ids = _write_sample(clone, again, stages["caption"].params["caption"]["batch_size"])
    if problem := _run_stage("caption", again, str(model.absolute()), code=clone):
        return Check(what, problem)
    before, now = ({row["pair_id"]: row["prediction"] for path in sorted((folder / CAPTIONS / "gate").glob("*.jsonl"))
                    for row in read_jsonl(path)}
                   for folder in (clone, again))
    changed = [pair_id for pair_id in pair_ids if now.get(pair_id) != before.get(pair_id)]
    same = 1 - len(changed) / len(pair_ids)
    what += (f" gives {100 * same:.1f} % identical captions of {len(pair_ids)} pairs of the `gate` split, "
             f"and at least {100 * SAME_CAPTIONS:.0f} % are required")
    if same >= SAME_CAPTIONS:
        return Check(what)
    return Check(what, f"{changed[0]}: must be '{before.get(changed[0])}', got '{now.get(changed[0])}'")


def _write_sample(clone: Path, again: Path, batch_size: int) -> list[str]:
    """Write a project folder that contains only some batches of the `gate` split. Return the ids of the pairs."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from onediff.data.record import shards

    table = pa.concat_tables(pq.read_table(path) for path in shards(clone / DIFFCAP, "gate-*.parquet"))
    starts = range(0, table.num_rows, batch_size)
    chosen = starts[::max(1, len(starts) // NUM_BATCHES)][:NUM_BATCHES]
    sample = pa.concat_tables(table.slice(start, batch_size) for start in chosen)
    (again / DIFFCAP).mkdir(parents=True)
    pq.write_table(sample, again / DIFFCAP / "gate-00000.parquet")
    pq.write_table(sample.slice(0, 1), again / DIFFCAP / "test-00000.parquet")  # The stage requires a `test` split.
    shutil.copyfile(clone / PARAMS, again / PARAMS)
    return [str(pair_id) for pair_id in sample["pair_id"].to_pylist()]


def _run_stage(name: str, folder: Path, *arguments: str, code: Path) -> str:
    """Run a DVC stage in a folder, with the code of the version's commit. Return why it failed, or an empty text."""
    environ = os.environ | {"PYTHONPATH": str(code), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-P", "-m", f"onediff.stages.{name}", *arguments], cwd=folder, env=environ,
                          capture_output=True, text=True, check=False)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return f"stage {name} of the commit failed: {lines[-1] if lines else 'no message'}" if done.returncode else ""
