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
from pathlib import Path

from onediff import freshness
from onediff.config import load_params
from onediff.files import disk_full_named
from onediff.network import exempt_loopback_from_proxies
from onediff.preflight import check_inputs, check_mixtures
from onediff.versioned import restore_outs

PARAMS = Path("params.yaml")
FLOW = "ONEDIFF_STARTED_BY"  # the process of the flow, if one started DVC


def run(stage: Callable[..., object]) -> None:
    """Calls the stage with the command line's arguments; an error of the world becomes one line and exit code 1.

    Under DVC the outs of its last run return first. It ends when DVC does, or the flow that started it: neither, when
    killed, may leave a stage writing where the next one writes.
    """
    if "DVC_STAGE" in os.environ:
        above = [os.getppid(), *filter(None, [int(os.environ.get(FLOW, 0))])]
        threading.Thread(target=_end_with, args=(above,), daemon=True).start()
    exempt_loopback_from_proxies()
    try:
        with disk_full_named(Path("data")):
            if "DVC_STAGE" in os.environ:
                _prepare(os.environ["DVC_STAGE"])
            stage(*sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"{stage.__name__}: {error}")


def _prepare(stage: str) -> None:
    """Before any heavy import: the outs that DVC removed return, then packages and params.yaml are checked."""
    restore_outs(stage)
    freshness.check(stage)
    if not PARAMS.exists():  # the stages that read it say so
        return
    config = load_params(PARAMS)
    if FLOW not in os.environ:  # a flow has checked, and its workers do not have every input
        check_inputs(config)
    if stage in ("align", "tune"):
        check_mixtures(config)


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
