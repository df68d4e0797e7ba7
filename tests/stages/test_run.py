"""Tests that a stage ends, with all worker processes, when it gets a signal or when the parent process was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from onediff.interrupts import SIGNALS

ROOT = Path(__file__).parents[2]
STAGE = """
import os, time
from pathlib import Path
from onediff.stages.command import run
def slow() -> None:
    Path("pid").write_text(str(os.getpid()))
    time.sleep(60)
run(slow)
"""
IMPORTING = """
import os, sys, time
from pathlib import Path
sys.argv[0] = "-m"
import onediff.stages
Path("pid").write_text(str(os.getpid()))
time.sleep(60)
"""
PARENT = """
import subprocess, sys
subprocess.run([sys.executable, "stage.py"])
"""


def _alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


@pytest.mark.parametrize("code", [STAGE, IMPORTING])
def test_a_stage_ends_after_the_dvc_process_that_started_the_stage_was_killed(code: str, tmp_path: Path) -> None:
    (tmp_path / "stage.py").write_text(code)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "DVC_STAGE": "slow"}
    with subprocess.Popen([sys.executable, "-c", PARENT], cwd=tmp_path, env=environment) as parent:
        deadline = time.monotonic() + 30
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        pid = int((tmp_path / "pid").read_text())
        assert _alive(pid)
        parent.send_signal(signal.SIGKILL)
    while _alive(pid):
        assert time.monotonic() < deadline
        time.sleep(0.1)


POOL = """
import time
from pathlib import Path
from onediff.config import Runtime
from onediff.data.parallel import spread
from onediff.stages.command import run
def sleep(item: int) -> int:
    Path("up").touch()
    time.sleep(60)
    return item
def slow() -> None:
    list(spread(lambda: sleep, range(9), Runtime(workers=2)))
run(slow)
"""


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_to_a_stage_and_its_workers_ends_all_these_processes_with_a_one_line_error(
        number: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "stage.py").write_text(POOL)
    stage = subprocess.Popen([sys.executable, "stage.py"], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
                             stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "up").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    workers = psutil.Process(stage.pid).children(recursive=True)
    os.killpg(stage.pid, number)
    os.killpg(stage.pid, number)
    assert stage.communicate(timeout=15)[1] == (
        f"slow: stopped by {number.name} before it was finished; the same command runs it again\n")
    assert stage.returncode == 1 and workers
    assert not psutil.wait_procs(workers, timeout=5)[1]
