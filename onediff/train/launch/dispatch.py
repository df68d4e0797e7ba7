"""Starts the ranks of a training phase with the launcher of runtime.yaml: none, DeepSpeed's, or Slurm."""

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

from onediff.config import Runtime
from onediff.train.launch import nodes, ranks, slurm
from onediff.train.status import is_finished, modified_ns, read_status, write_status

PATIENCE_S = 30.0  # longest time in seconds until shared storage shows a file that another node wrote
AGAIN = "run the same command again to continue from the last checkpoint"
# Error messages of gloo and NCCL match this pattern if the connection to another rank was lost.
LOST = re.compile(r"(reset|closed) by peer|timed? ?out|NCCL|Broken pipe", re.IGNORECASE)


def launch_ranks(phase: str, runtime: Runtime, folder: Path, *, module: str | None = None) -> bool:
    """Start the ranks, each as `python -m onediff.stages.PHASE`, and wait until they end.

    Returns True when the run is finished and `folder` contains the results, and False without starting anything if this
    process must train by itself. With several nodes, `folder` must be on storage that all nodes share. Raises
    ValueError or FileNotFoundError if runtime.yaml is wrong, and ValueError with the reason if the ranks failed or were
    stopped.
    """
    if runtime.launcher == "local" or "LOCAL_RANK" in os.environ:
        return False
    if is_finished(folder):  # Ranks may finish training after the DVC stage that started them was killed.
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
        if runtime.node_rank and not code:  # Only node 0 reports how the run ended.
            return True
        ending = _ending(code)
    elsewhere = runtime.launcher == "slurm" or runtime.nodes > 1
    end = time.monotonic() + (PATIENCE_S if elsewhere else 0.0)
    while (status := read_status(folder))["state"] in ("running", "not started") and time.monotonic() < end:
        time.sleep(0.5)
    if is_finished(folder):
        return True
    is_new = modified_ns(folder) != modified_before
    message = _explanation(phase, folder, status if is_new else None, ending=ending, stopped=stopped)
    raise ValueError(message)


def _explanation(phase: str, folder: Path, status: dict[str, Any] | None, *, ending: str, stopped: bool) -> str:
    """Return the message that says why the ranks ended, and record the reason in status.json.

    The reason is read from status.json if the ranks have written it there. Otherwise, the reason is `ending`, a
    sentence that says how the launcher ended.
    """
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
    return f"{phase}: {reason}; see the output of the ranks above; {AGAIN} ({folder})"


def _ending(code: int) -> str:
    """Describe how the ranks ended, from the exit code of the launcher.

    If a signal ended a rank, DeepSpeed's launcher exits with 256 minus the signal number, and a shell with 128 plus the
    signal number.
    """
    for number in (-code, 256 - code if code < 255 else 0, code - 128):
        if number in set(signal.Signals):
            name = signal.Signals(number).name
            return f"a rank was ended by {name}" + (", perhaps because memory ran out" if name == "SIGKILL" else "")
    return f"the ranks ended with code {code} before the run was finished"
