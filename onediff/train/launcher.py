"""Where a phase runs: in this process, or on several GPUs through DeepSpeed's launcher."""

from __future__ import annotations

import os
import subprocess
import sys

from onediff.config import Runtime


def hand_over(phase: str, runtime: Runtime) -> bool:
    """Starts the stage again on every GPU if runtime.yaml asks for it, and waits; False if this process does the work.

    Raises ValueError if the ranks fail; why stands in their output and in scratch's status.json.
    """
    if runtime.launcher == "local" or "LOCAL_RANK" in os.environ:
        return False
    command = ["deepspeed", "--num_gpus", str(runtime.gpus), "--module", f"onediff.stages.{phase}"]
    code = subprocess.run([os.path.join(os.path.dirname(sys.executable), command[0]), *command[1:]],
                          check=False).returncode
    if code:
        raise ValueError(f"{phase}: the ranks ended with code {code}; "
                         f"see {runtime.scratch}/{phase}-*/status.json for the reason")
    return True
