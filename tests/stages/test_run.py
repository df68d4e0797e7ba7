from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

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
PARENT = """
import subprocess, sys
subprocess.run([sys.executable, "stage.py"])
"""


def _alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_a_stage_ends_when_the_dvc_that_started_it_was_killed(tmp_path: Path) -> None:
    (tmp_path / "stage.py").write_text(STAGE)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "DVC_STAGE": "slow"}
    with subprocess.Popen([sys.executable, "-c", PARENT], cwd=tmp_path, env=environment) as parent:
        last = time.monotonic() + 30
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            assert time.monotonic() < last
            time.sleep(0.05)
        pid = int((tmp_path / "pid").read_text())
        assert _alive(pid)
        parent.send_signal(signal.SIGKILL)
    while _alive(pid):
        assert time.monotonic() < last
        time.sleep(0.1)
