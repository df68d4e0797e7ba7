"""Tests of each stage on a full file system: it prints a one-line error and keeps all earlier outputs.

When disk space is free again, the same command completes the stage.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from onediff.repro.lock import md5_of

ROOT = Path(__file__).parents[2]
SIZE_MB = 512
OUTS = {"synthesize scenes": ["synthetic/scenes"], "synthesize edits": ["synthetic/edits"], "probe": ["probe.parquet"],
        "validate": ["quarantine.parquet"], "build": ["diffcap"], "align": ["models/align", "curves/align.jsonl"],
        "tune": ["models/tune", "curves/tune.jsonl"], "caption": ["captions"],
        "score": ["scored", "metrics.json", "gate.json"], "stress": ["stress", "stress.json"],
        "report": ["report.html", "figures"]}

# These outputs contain times, so they differ between two runs of a stage.
WITH_TIMES = {"curves/align.jsonl", "curves/tune.jsonl", "report.html"}


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Mount a small file system and create a project on it."""
    folder = tmp_path_factory.mktemp("disk")
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE_MB}m", "tmpfs", str(folder)], check=True)
    try:
        (folder / "presets").symlink_to(ROOT / "presets")
        shutil.copy(ROOT / "presets/micro.yaml", folder / "params.yaml")
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def run(folder: Path, stage: str) -> tuple[int, str]:
    name, *arguments = stage.split()
    done = subprocess.run([sys.executable, "-m", f"onediff.stages.{name}", *arguments], cwd=folder, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT), "ONEDIFF_CHECKPOINT_EVERY_S": "0.05"},
                          capture_output=True, check=False)
    return done.returncode, done.stderr


def fill(folder: Path, free_bytes: int) -> Path:
    """Fill the file system until only `free_bytes`, rounded down to pages of 4096 bytes, are free.

    Returns the file that fills the file system.
    """
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError as error:
            assert error.errno == errno.ENOSPC
        file.truncate(file.tell() - free_bytes // 4096 * 4096)
    return ballast


def digests(folder: Path, stage: str) -> dict[str, str]:
    return {name: md5_of(folder / "data" / name) for name in OUTS[stage]}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a file system")
@pytest.mark.parametrize("stage", OUTS)
def test_a_stage_on_a_full_disk_keeps_its_outputs_and_succeeds_when_space_is_free(stage: str, disk: Path) -> None:
    """Run the stages in the order of the pipeline, because all parameters of this test share one project."""
    status, stderr = run(disk, stage)
    assert status == 0, stderr[-3000:]
    before = digests(disk, stage)
    size = sum(path.stat().st_size for name in OUTS[stage] for path in (disk / "data" / name, *(
        disk / "data" / name).rglob("*")) if path.is_file())
    for free in (0, size // 2):
        ballast = fill(disk, free)
        status, stderr = run(disk, stage)
        ballast.unlink()
        last_line = stderr.strip().splitlines()[-1]
        assert status == 1 and "Traceback" not in stderr, stderr[-3000:]
        assert "disk is full" in last_line or "No space left" in last_line, last_line
        assert digests(disk, stage) == before
    status, stderr = run(disk, stage)
    assert status == 0, stderr[-3000:]
    after = digests(disk, stage)
    assert {name for name in before if before[name] != after[name]} <= WITH_TIMES
