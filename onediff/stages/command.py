"""What the command of every stage does: read arguments, check inputs, and report errors and interrupts in one line."""

import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path

from onediff import interrupts
from onediff.config import load_params
from onediff.files import disk_full_named
from onediff.network import exempt_loopback_from_proxies
from onediff.repro import freshness
from onediff.repro.lock import restore_outs
from onediff.repro.preflight import check_inputs, check_mixtures

PARAMS = Path("params.yaml")
END_S = 10.0  # for an interrupted stage to clean up; training writes its checkpoint before


def run(stage: Callable[..., object]) -> None:
    """Calls the stage with the command line's arguments; an error of the world becomes one line and exit code 1, and
    so does a signal that asks it to end. Under DVC the outs of its last run return first.
    """
    interrupts.survive_closed_output()
    interrupts.raise_keyboard_interrupt(END_S)
    interrupts.end_with_starters()
    exempt_loopback_from_proxies()
    try:
        with disk_full_named(Path("data")):
            if "DVC_STAGE" in os.environ:
                _prepare(os.environ["DVC_STAGE"])
            stage(*sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"{stage.__name__}: {str(error).removeprefix(f'{stage.__name__}: ')}")
    except KeyboardInterrupt as interrupt:
        for process in multiprocessing.active_children():  # whose work is of no use any more
            process.kill()
        sys.exit(f"{stage.__name__}: stopped by {interrupt} before it was finished; the same command runs it again")
    finally:
        interrupts.ignore()  # what is left is the end of this process


def _prepare(stage: str) -> None:
    """Puts back the outs that DVC removed, then checks packages and params.yaml. Runs before any slow import."""
    restore_outs(stage)
    freshness.check(stage)
    if not PARAMS.exists():  # the stages that read it say so
        return
    config = load_params(PARAMS)
    if interrupts.FLOW not in os.environ:  # the flow has checked already; a worker may lack inputs of other stages
        check_inputs(config)
    if stage in ("align", "tune"):
        check_mixtures(config)
