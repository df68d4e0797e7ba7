"""Tests that kill each long stage with SIGKILL at a random time and run the same command again."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from onediff.data.record import digest

ROOT = Path(__file__).resolve().parents[2]
OUTS = {"synthesize scenes": "data/synthetic/scenes/*.parquet", "synthesize edits": "data/synthetic/edits/*.parquet",
        "align": "data/models/align/model.safetensors", "tune": "data/models/tune/model.safetensors",
        "caption": "data/captions/*/*.jsonl", "stress": "data/stress/*.jsonl"}
BEFORE = {"align": ("probe", "validate", "build")}  # short stages that must run before a long stage


def start(folder: Path, stage: str) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "ONEDIFF_CHECKPOINT_EVERY_S": "0.05",
                                "ONEDIFF_SCRATCH": "scratch"}
    name, *arguments = stage.split()
    return subprocess.Popen([sys.executable, "-m", f"onediff.stages.{name}", *arguments], cwd=folder, env=environment,
                            start_new_session=True, stdout=subprocess.DEVNULL, stderr=(folder / "stderr").open("ab"))


def finish(folder: Path, stage: str) -> float:
    """Run a stage until it ends, check that it succeeded, and return the duration in seconds."""
    started = time.monotonic()
    assert start(folder, stage).wait(300) == 0, (folder / "stderr").read_text()[-2000:]
    return time.monotonic() - started


def digests(folder: Path, stage: str) -> dict[str, str]:
    return {path.name: digest(path.read_bytes()) for path in sorted(folder.glob(OUTS[stage]))}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    """Return a project in which all stages ran without interruption, and the duration of each stage in seconds."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    (folder / "presets").symlink_to(ROOT / "presets")
    shutil.copy(ROOT / "presets/micro.yaml", folder / "params.yaml")
    seconds = {}
    for stage in OUTS:
        for short_stage in BEFORE.get(stage, ()):
            finish(folder, short_stage)
        seconds[stage] = finish(folder, stage)
    return folder, seconds


@pytest.mark.slow
@pytest.mark.parametrize("stage", OUTS)
def test_a_stage_that_was_killed_twice_gives_the_outputs_of_an_uninterrupted_stage(
        stage: str, uninterrupted: tuple[Path, dict[str, float]], tmp_path: Path) -> None:
    project, seconds = uninterrupted
    folder = tmp_path / "killed"
    shutil.copytree(project, folder, symlinks=True, ignore=shutil.ignore_patterns("scratch"))
    for path in folder.glob(OUTS[stage]):
        path.unlink()
    for _ in range(2):
        process = start(folder, stage)
        time.sleep(seconds[stage] * random.uniform(0.3, 0.95))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    finish(folder, stage)
    assert digests(folder, stage) == digests(project, stage)
    assert digests(project, stage)
