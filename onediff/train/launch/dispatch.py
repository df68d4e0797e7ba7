"""Where a phase runs: in this process, on the GPUs of one node or many through DeepSpeed's launcher, or under Slurm."""

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

from onediff.config import Runtime
from onediff.train.launch import nodes, ranks, slurm
from onediff.train.status import is_finished, modified_ns, read_status, write_status

PATIENCE_S = 30.0  # until shared storage shows what rank 0 wrote on another node
AGAIN = "the same command goes on from the last checkpoint"
LOST = re.compile(r"(reset|closed) by peer|timed? ?out|NCCL|Broken pipe", re.IGNORECASE)  # gloo's and NCCL's words


def launch_ranks(phase: str, runtime: Runtime, folder: Path, *, module: str | None = None) -> bool:
    """Starts the ranks, each `python -m onediff.stages.PHASE`, and waits; False if this process is to do the work.

    True: the run is finished, and its results are in `folder`, which lies in scratch on storage that all nodes share.
    Raises ValueError with the reason if the ranks failed or SIGTERM stopped them; ValueError or FileNotFoundError,
    before anything starts, if runtime.yaml cannot work.
    """
    if runtime.launcher == "local" or "LOCAL_RANK" in os.environ:
        return False
    if is_finished(folder):  # by ranks whose stage was killed meanwhile
        return True
    folder.mkdir(parents=True, exist_ok=True)
    module, modified_before = module or f"onediff.stages.{phase}", modified_ns(folder)
    if runtime.launcher == "slurm":
        ending, stopped = slurm.run(runtime, module, folder)
    else:
        nodes.check(runtime)
        code, stopped = ranks.run(nodes.command(runtime, module, folder),
                                  nodes.environment(runtime, folder, os.environ),
                                  grace_s=max(ranks.GRACE_S, runtime.grace_s))
        if runtime.node_rank and not code:  # node 0 reports how the run ended, and may have fetched the model by now
            return True
        ending = _ending(code)
    elsewhere = runtime.launcher == "slurm" or runtime.nodes > 1
    end = time.monotonic() + (PATIENCE_S if elsewhere else 0.0)
    while (status := read_status(folder))["state"] in ("running", "not started") and time.monotonic() < end:
        time.sleep(0.5)
    if is_finished(folder):
        return True
    is_new = modified_ns(folder) != modified_before
    raise ValueError(_explanation(phase, folder, status if is_new else None, ending=ending, stopped=stopped))


def _explanation(phase: str, folder: Path, status: dict[str, Any] | None, *, ending: str, stopped: bool) -> str:
    """The ranks' own reason if this run has written a status, else how the ranks ended, which becomes the status."""
    if status and status["state"] in ("failed", "diverged", "preempted"):
        state, reason = status["state"], str(status["reason"])
        if LOST.search(reason):
            state, cause = ("preempted", "stopped by SIGTERM") if stopped else ("failed", "a rank or its node was lost")
            reason = f"{cause} ({' '.join(reason.split()[:20])} ...)"
            write_status(folder, state, status["step"], reason)
        cure = "" if status["state"] == "diverged" else f"; {AGAIN}"
        return f"{phase}: {state} at step {status['step']}: {reason}{cure} ({folder})"
    state, reason = ("preempted", f"stopped by SIGTERM, {ending}") if stopped else ("failed", ending)
    write_status(folder, state, read_status(folder)["step"], reason)
    return f"{phase}: {reason}; what they said stands above; {AGAIN} ({folder})"


def _ending(code: int) -> str:
    """How the ranks ended. DeepSpeed's launcher reports a rank's signal as 256 minus its number, a shell as 128 plus.
    """
    for number in (-code, 256 - code if code < 255 else 0, code - 128):
        if number in set(signal.Signals):
            name = signal.Signals(number).name
            return f"a rank was ended by {name}" + (", perhaps for want of memory" if name == "SIGKILL" else "")
    return f"the ranks ended with code {code} before the run was finished"
