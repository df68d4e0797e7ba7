"""Handle the signals that ask a program to stop: SIGINT (Ctrl-C), SIGTERM (`kill`) and SIGHUP (a closed terminal).

A signal that is ignored when the program starts stays ignored, so `nohup` works. The module also keeps a program
running if its output can no longer be written.
"""

from __future__ import annotations

import errno
import io
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
FLOW = "ONEDIFF_STARTED_BY"  # environment variable with the process id of the Prefect flow that started DVC

Handler = Callable[[int, FrameType | None], None]


@dataclass
class Stop:
    """A request to stop this process: `reason` is the name of the signal, or empty if no signal has arrived yet."""

    reason: str = ""

    def ask(self, number: int, frame: FrameType | None) -> None:
        """Signal handler that stores the name of the first signal in `reason`."""
        self.reason = self.reason or signal.Signals(number).name


@contextmanager
def postponed(stop: Stop) -> Iterator[Stop]:
    """Context manager in which a stop signal only sets `stop.reason`, so that the `with` block stops at a safe point.

    Python allows signal handlers only in the main thread. In other threads `stop.reason` stays empty.
    """
    previous = _handle(stop.ask) if threading.current_thread() is threading.main_thread() else {}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def raise_keyboard_interrupt(limit_s: float) -> None:
    """Set signal handlers that raise KeyboardInterrupt, with the name of the signal, at the first stop signal.

    Later signals are ignored, so that they do not interrupt the clean-up. The process exits `limit_s` seconds after
    the first signal, even if the clean-up is still running or a library has caught the KeyboardInterrupt.
    """
    stop, previous_hook = Stop(), sys.unraisablehook

    def interrupt(number: int, frame: FrameType | None) -> None:
        if not stop.reason:
            stop.ask(number, frame)
            _start_timer(limit_s, os._exit, 1)
            raise KeyboardInterrupt(stop.reason)

    def send_again(ignored: Any) -> None:
        """Send the stop signal again if Python has dropped the KeyboardInterrupt; report other dropped exceptions.

        Python drops an exception that is raised in a __del__ method or a weakref callback, and then calls this hook.
        """
        if stop.reason and isinstance(ignored.exc_value, KeyboardInterrupt):
            number, stop.reason = signal.Signals[stop.reason], ""
            _start_timer(0.05, os.kill, os.getpid(), number)
        else:
            previous_hook(ignored)

    _handle(interrupt)
    sys.unraisablehook = send_again


def _start_timer(seconds: float, function: Callable[..., Any], *arguments: int) -> None:
    """Call `function` after `seconds` in a daemon thread, which does not keep the process alive."""
    timer = threading.Timer(seconds, function, arguments)
    timer.daemon = True
    timer.start()


def end_with_starters() -> None:
    """Start a thread that sends SIGTERM to this process when the DVC process or the Prefect flow above it ends.

    Without this, a stage would continue after DVC was killed, and would write to the same files as the next run. If
    DVC did not start this process, the function does nothing.
    """
    if "DVC_STAGE" in os.environ:
        starters = [os.getppid(), *filter(None, [int(os.environ.get(FLOW, 0))])]
        threading.Thread(target=_end_with, args=(starters,), daemon=True).start()


def _end_with(starters: list[int]) -> None:
    """Wait until one of the processes with the ids `starters` has ended, then send SIGTERM to this process."""
    import psutil

    with suppress(psutil.NoSuchProcess):
        processes = [psutil.Process(pid) for pid in starters]
        while all(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes):
            time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)  # A training process reacts to SIGTERM by saving a checkpoint.


def ignore() -> None:
    """Ignore all stop signals in this process and in the child processes that it starts."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def use_default_actions() -> None:
    """Let a stop signal end this process as the operating system does it: at once, without a stack trace."""
    _handle(signal.SIG_DFL)


def end_while_importing() -> None:
    """End the process with a one-line message if a stop signal arrives while `python -m MODULE` imports packages.

    Without this, Python would print the stack trace of the interrupted import. The `__init__.py` of the package of
    MODULE calls this function. Its signal handlers stay until MODULE sets other handlers.
    """
    if sys.argv[0] == "-m":  # sys.argv[0] is -m until `python -m` has located the module.
        _handle(_end_at_once)
        end_with_starters()


def handle_as_python_does() -> None:
    """Restore Python's default signal handlers, which `end_while_importing` has replaced."""
    for number in SIGNALS:
        if signal.getsignal(number) is _end_at_once:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def survive_closed_output() -> None:
    """Let this process continue if its output can no longer be written: printed text is then dropped without an error.

    The output cannot be written after the terminal was closed or the reader of a pipe has ended. An error would end a
    training before it saves a checkpoint. If the terminal is closed, this function also sends SIGHUP to this process,
    because the kernel sends it only to the session leader, and `make` does not forward it. Background jobs get no
    SIGHUP, so they continue.
    """
    with suppress(OSError):  # `tcgetpgrp` raises OSError if standard error is not the terminal of this session.
        if os.tcgetpgrp(2) == os.getpgrp():
            threading.Thread(target=_wait_for_hangup, daemon=True).start()
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        stream.flush()
        raw: Any = _Forgiving(stream.fileno(), "wb", closefd=False)
        setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(raw), encoding=stream.encoding, errors=stream.errors,
                                            line_buffering=stream.line_buffering, write_through=stream.write_through))


def _wait_for_hangup() -> None:
    """Wait until the terminal is closed, then send SIGHUP to this process if it has a handler for SIGHUP."""
    poll = select.poll()
    poll.register(2, 0)
    poll.poll()
    if callable(signal.getsignal(signal.SIGHUP)):
        os.kill(os.getpid(), signal.SIGHUP)


def _handle(handler: Handler | signal.Handlers) -> dict[signal.Signals, signal._HANDLER]:
    """Set the handler for all stop signals that are not ignored. Return a dict from signal to previous handler."""
    return {number: signal.signal(number, handler) for number in SIGNALS
            if signal.getsignal(number) is not signal.SIG_IGN}


def _end_at_once(number: int, frame: FrameType | None) -> None:
    """Print one line and exit without clean-up, which is safe because nothing was written yet."""
    line = f"onediff: stopped by {signal.Signals(number).name} before it did any work; run the command again\n"
    try:
        os.write(2, line.encode())
    finally:
        os._exit(128 + number)


class _Forgiving(io.FileIO):
    """A file that discards writes to a closed terminal (EIO) or to a pipe without a reader (EPIPE)."""

    def write(self, data: bytes) -> int:  # type: ignore[override]
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EIO, errno.EPIPE):
                raise
            return len(data)
