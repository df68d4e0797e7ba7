"""What every stage's command shares: arguments, errors in one line, quiet libraries, and an end with its parent."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable

from onediff.network import exempt_loopback_from_proxies

FLOW = "ONEDIFF_STARTED_BY"  # the process of the flow, if one started DVC


def run(stage: Callable[..., object]) -> None:
    """Calls the stage with the command line's arguments; an error of the world becomes one line and exit code 1.

    Under DVC it ends when DVC does, or the flow that started it: neither, when killed, may leave a stage writing where
    the next one writes.
    """
    if "DVC_STAGE" in os.environ:
        above = [os.getppid(), *filter(None, [int(os.environ.get(FLOW, 0))])]
        threading.Thread(target=_end_with, args=(above,), daemon=True).start()
    exempt_loopback_from_proxies()
    try:
        stage(*sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"{stage.__name__}: {error}")


def _end_with(above: list[int]) -> None:
    import psutil

    try:
        watched = [psutil.Process(pid) for pid in above]
        while all(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in watched):
            time.sleep(0.5)
    except psutil.NoSuchProcess:
        pass
    os.kill(os.getpid(), signal.SIGTERM)  # training writes a checkpoint first


def quiet() -> None:
    """Libraries tell errors, not their life."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if os.path.exists("/dev/nvidia0") else "cpu")
    warnings.filterwarnings("ignore", module="torch|transformers|deepspeed")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
