"""The command line of every stage: read arguments, check inputs, and report errors and interrupts in one line."""

import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path

from onediff import interrupts
from onediff.allocator import keep_freed_memory
from onediff.config import load_params
from onediff.files import disk_full_named
from onediff.network import exempt_loopback_from_proxies
from onediff.repro import freshness
from onediff.repro.lock import restore_outs
from onediff.repro.preflight import check_inputs, check_mixtures

PARAMS = Path("params.yaml")
END_S = 10.0  # seconds that an interrupted stage has for its clean-up, before its process is ended


def run(stage: Callable[..., object]) -> None:
    """Call the function `stage`, which is the code of a DVC stage, with the arguments of the command line.

    After a ValueError, an OSError or an interrupt, the process prints one line and exits with code 1. If DVC started
    the process, it has removed the outputs of the stage's last run, so these outputs are restored first.
    """
    interrupts.survive_closed_output()
    interrupts.raise_keyboard_interrupt(END_S)
    interrupts.end_with_starters()
    exempt_loopback_from_proxies()
    keep_freed_memory()
    try:
        with disk_full_named(Path("data")):
            if "DVC_STAGE" in os.environ:
                _prepare(os.environ["DVC_STAGE"])
            stage(*sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"{stage.__name__}: {str(error).removeprefix(f'{stage.__name__}: ')}")
    except KeyboardInterrupt as interrupt:
        # After an interrupt nobody needs the results of the child processes, so they are killed.
        for process in multiprocessing.active_children():
            process.kill()
        sys.exit(f"{stage.__name__}: stopped by {interrupt} before it was finished; the same command runs it again")
    finally:
        interrupts.ignore()  # A second stop signal must not interrupt the process while it ends.


def _prepare(stage: str) -> None:
    """Restore the outputs that DVC removed, then check packages and params.yaml, before slow packages are imported."""
    restore_outs(stage)
    freshness.check(stage)
    if not PARAMS.exists():  # A stage that needs params.yaml reports the missing file.
        return
    config = load_params(PARAMS)
    # A Prefect flow checks all inputs before it starts stages, and its worker may not have the inputs of other stages.
    if interrupts.FLOW not in os.environ:
        check_inputs(config)
    if stage in ("align", "tune"):
        check_mixtures(config)
