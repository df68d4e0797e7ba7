"""Run a flow from the command line: one run at a time in a folder, a Prefect server, a clean end after an interrupt."""

import logging
import os
import shlex
import signal
import socket
import sys
import threading
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import psutil
from prefect import Flow, State
from prefect.logging.handlers import PrefectConsoleHandler

from flows.pipeline import training_status
from flows.processes import send_signal
from flows.server import temporary_server
from onediff import interrupts
from onediff.config import load_runtime
from onediff.git import configure_dvc
from onediff.paths import check_project

SPARE_S = 4.0  # seconds that an interrupted flow gets to end, in addition to the `grace_s` seconds of its stage


def run(flow: Flow[Any, Any], *arguments: Any, lock: AbstractContextManager[None] | None = None) -> State[Any]:
    """Run a Prefect flow and return its final state. Exit with a one-line message if the flow does not complete.

    `lock` is acquired before the Prefect server starts, so that a second run in the same folder is refused at once.
    """
    start = time.time()
    survive_closed_output()
    try:
        limit_s = load_runtime().grace_s + SPARE_S
        interrupts.raise_keyboard_interrupt(limit_s)
        _limit_the_end(limit_s)
        check_project()
        configure_dvc()
        with lock or nullcontext(), temporary_server():
            state: Any = flow(*arguments, return_state=True)
    except (ValueError, OSError) as error:
        sys.exit(f"onediff: {error}")
    except KeyboardInterrupt as interrupt:
        _end_descendants()
        status = training_status(Path(), start)
        progress = f", and training up to step {status['step']}" if status else ""
        again = "make run" if "MAKELEVEL" in os.environ else shlex.join(["python", *sys.orig_argv[1:]])
        print(f"onediff: stopped by {interrupt}; finished stages are kept{progress}; '{again}' continues",
              file=sys.stderr, flush=True)
        # os._exit skips Prefect's exit handlers, which would wait for a server that no longer runs.
        os._exit(128 + signal.Signals[str(interrupt)])
    if not state.is_completed():
        sys.exit(f"onediff: {state.message}")
    return state


def survive_closed_output() -> None:
    """Let this process continue when the program that reads its output has closed the pipe.

    `interrupts.survive_closed_output` replaces sys.stderr. Prefect's log handlers still write to the old sys.stderr, so
    they get the new one too. Otherwise rich, which they print with, would end the process at the closed pipe.
    """
    before = sys.stderr
    interrupts.survive_closed_output()
    for logger in (logging.root, *logging.root.manager.loggerDict.values()):
        for handler in getattr(logger, "handlers", ()):
            if isinstance(handler, PrefectConsoleHandler) and handler.stream is before:
                handler.stream = handler.console.file = sys.stderr


def _limit_the_end(seconds: float) -> None:
    """Start a thread that waits for the first stop signal, silences all logs, and ends the process `seconds` later.

    A thread is needed because Prefect replaces the handler of SIGTERM while a flow runs.
    """
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    signal.set_wakeup_fd(sender.detach(), warn_on_full_buffer=False)
    threading.Thread(target=_exit_after, args=(receiver, seconds), daemon=True).start()


def _exit_after(receiver: socket.socket, seconds: float) -> None:
    while receiver.recv(1)[0] not in interrupts.SIGNALS:
        pass
    logging.disable()
    time.sleep(seconds)
    _end_descendants()
    os._exit(1)


def _end_descendants() -> None:
    """End every descendant of this process: the temporary Prefect server and the commands of the current DVC stage."""
    family = psutil.Process().children(recursive=True)
    send_signal(family, signal.SIGTERM)
    _, alive = psutil.wait_procs(family, timeout=1)
    send_signal(alive, signal.SIGKILL)
