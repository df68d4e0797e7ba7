"""Where a phase runs: in this process, on the GPUs of one node or many through DeepSpeed's launcher, or under Slurm."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from onediff.config import Runtime
from onediff.train.launch import nodes, processes, slurm

PATIENCE_S = 30.0  # until what a rank on another node wrote shows on shared storage
AGAIN = "the same command goes on from the last checkpoint"


def hand_over(phase: str, runtime: Runtime, folder: Path, *, module: str | None = None) -> bool:
    """Starts the ranks, each `python -m onediff.stages.PHASE`, and waits; False if this process does the work.

    True: status.json in `folder`, the run's scratch on storage that all nodes share, says finished, and the weights
    are in `folder`/final. Raises ValueError with the reason if the ranks failed or SIGTERM stopped them, and
    ValueError or FileNotFoundError before anything starts if runtime.yaml cannot work.
    """
    if runtime.launcher == "local" or "LOCAL_RANK" in os.environ:
        return False
    if is_finished(folder):  # nobody was there to fetch it
        return True
    folder.mkdir(parents=True, exist_ok=True)
    module = module or f"onediff.stages.{phase}"
    before = _stamp(folder)
    if runtime.launcher == "slurm":
        ended, stopped = slurm.run(runtime, module, folder)
    else:
        nodes.check(runtime)
        code, stopped = processes.run(nodes.command(runtime, module, folder),
                                      nodes.environment(runtime, folder, os.environ))
        ended = _cause(code)
    status = settled(folder, patience_s=PATIENCE_S if runtime.nodes > 1 or runtime.launcher == "slurm" else 0.0)
    if status["state"] == "finished":
        return True
    raise ValueError(_explanation(phase, folder, status, ended=ended, stopped=stopped, fresh=_stamp(folder) != before))


def read_status(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / "status.json").read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {"state": "not started", "step": 0, "reason": ""}


def is_finished(folder: Path) -> bool:
    return read_status(folder)["state"] == "finished" and (folder / "final").is_dir()


def settled(folder: Path, *, patience_s: float) -> dict[str, Any]:
    """status.json once it tells an end, or as it is after `patience_s`."""
    end = time.monotonic() + patience_s
    while (status := read_status(folder))["state"] in ("running", "not started") and time.monotonic() < end:
        time.sleep(0.5)
    return status


def _stamp(folder: Path) -> int:
    """Changes with every writing; by no clock but that of the storage."""
    try:
        return (folder / "status.json").stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _explanation(phase: str, folder: Path, status: dict[str, Any], *, ended: str, stopped: bool, fresh: bool) -> str:
    """The ranks' own reason if they left one in this run; else how they ended, which is then noted as the reason."""
    if fresh and status["state"] in ("failed", "diverged", "preempted"):
        cure = "" if status["state"] == "diverged" else f"; {AGAIN}"
        return f"{phase}: {status['state']} at step {status['step']}: {status['reason']}{cure} ({folder})"
    from onediff.train.checkpoint import write_status

    if stopped:
        write_status(folder, "preempted", status["step"], f"SIGTERM; {ended}")
        return f"{phase}: stopped by SIGTERM, {ended}; {AGAIN} ({folder})"
    write_status(folder, "failed", status["step"], ended)
    return f"{phase}: {ended}; what they said stands above; {AGAIN} ({folder})"


def _cause(code: int) -> str:
    """DeepSpeed's launcher gives a rank's signal as 256 minus its number, a shell as 128 plus."""
    numbers = {entry.value for entry in signal.Signals}
    for number in (-code, 256 - code if code < 255 else 0, code - 128):
        if number in numbers:
            name = signal.Signals(number).name
            return f"a rank was ended by {name}" + (", perhaps for want of memory" if name == "SIGKILL" else "")
    return f"the ranks ended with code {code} before they had finished"
