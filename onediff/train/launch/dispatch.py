"""Where a phase runs: in this process, on the GPUs of one node or many through DeepSpeed's launcher, or under Slurm."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

from onediff.config import Runtime
from onediff.train.launch import nodes, slurm
from onediff.train.launch import ranks as processes
from onediff.train.launch.status import is_finished, settled, stamp

PATIENCE_S = 30.0  # until what rank 0 wrote on another node shows on shared storage
AGAIN = "the same command goes on from the last checkpoint"
LOST = re.compile(r"(reset|closed) by peer|timed? ?out|NCCL|Broken pipe", re.IGNORECASE)  # gloo's and NCCL's words


def hand_over(phase: str, runtime: Runtime, folder: Path, *, module: str | None = None) -> bool:
    """Starts the ranks, each `python -m onediff.stages.PHASE`, and waits; False if this process does the work.

    True: the run is finished, and `folder`, its scratch on storage that all nodes share, holds what rank 0 left there.
    Raises ValueError with the reason if the ranks failed or SIGTERM stopped them; ValueError or FileNotFoundError,
    before anything starts, if runtime.yaml cannot work.
    """
    if runtime.launcher == "local" or "LOCAL_RANK" in os.environ:
        return False
    if is_finished(folder):  # by ranks whose stage was killed meanwhile
        return True
    folder.mkdir(parents=True, exist_ok=True)
    module, before = module or f"onediff.stages.{phase}", stamp(folder)
    if runtime.launcher == "slurm":
        ended, stopped = slurm.run(runtime, module, folder)
    else:
        nodes.check(runtime)
        code, stopped = processes.run(nodes.command(runtime, module, folder),
                                      nodes.environment(runtime, folder, os.environ),
                                      grace_s=max(processes.GRACE_S, runtime.grace_s))
        if runtime.node_rank and not code:  # node 0 tells the whole run's end, and may have fetched it by now
            return True
        ended = _cause(code)
    elsewhere = runtime.launcher == "slurm" or runtime.nodes > 1
    status = settled(folder, patience_s=PATIENCE_S if elsewhere else 0.0)
    if is_finished(folder):
        return True
    raise ValueError(_explanation(phase, folder, status, ended=ended, stopped=stopped, fresh=stamp(folder) != before))


def _explanation(phase: str, folder: Path, status: dict[str, Any], *, ended: str, stopped: bool, fresh: bool) -> str:
    """The ranks' own reason if they left one in this run; else how they ended, which is then noted as the reason."""
    from onediff.train.checkpoint import write_status

    if fresh and status["state"] in ("failed", "diverged", "preempted"):
        state, reason = status["state"], str(status["reason"])
        cure = "" if status["state"] == "diverged" else f"; {AGAIN}"
        if LOST.search(reason):
            state, why = ("preempted", "stopped by SIGTERM") if stopped else ("failed", "a rank or its node was lost")
            reason = f"{why} ({' '.join(reason.split()[:20])} ...)"
            write_status(folder, state, status["step"], reason)
        return f"{phase}: {state} at step {status['step']}: {reason}{cure} ({folder})"
    state, reason = ("preempted", f"stopped by SIGTERM, {ended}") if stopped else ("failed", ended)
    write_status(folder, state, status["step"], reason)
    return f"{phase}: {reason}; what they said stands above; {AGAIN} ({folder})"


def _cause(code: int) -> str:
    """DeepSpeed's launcher gives a rank's signal as 256 minus its number, a shell as 128 plus."""
    numbers = {entry.value for entry in signal.Signals}
    for number in (-code, 256 - code if code < 255 else 0, code - 128):
        if number in numbers:
            name = signal.Signals(number).name
            return f"a rank was ended by {name}" + (", perhaps for want of memory" if name == "SIGKILL" else "")
    return f"the ranks ended with code {code} before the run was finished"
