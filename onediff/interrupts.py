"""Signals that ask a program to end (Ctrl-C, `kill`, a closed terminal), and output that nobody reads any more.

A signal that was ignored when the program started stays ignored: `nohup` ignores SIGHUP.
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
FLOW = "ONEDIFF_STARTED_BY"  # environment variable: the process id of the flow, if one started DVC

Handler = Callable[[int, FrameType | None], None]


@dataclass
class Stop:
    """The name of the signal that asked this process to end; empty if none did."""

    reason: str = ""

    def ask(self, number: int, frame: FrameType | None) -> None:
        self.reason = self.reason or signal.Signals(number).name


@contextmanager
def postponed(stop: Stop) -> Iterator[Stop]:
    """Within the block a signal only sets `stop.reason`. The code of the block reads it and ends when it is ready.

    Python allows signal handlers in the main thread only. In another thread `stop.reason` stays empty.
    """
    before = _handle(stop.ask) if threading.current_thread() is threading.main_thread() else {}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def raise_keyboard_interrupt(limit_s: float) -> None:
    """From now on the first signal raises KeyboardInterrupt with the name of the signal. Later signals are ignored, so
    that they do not interrupt the clean-up. After `limit_s` the process exits even if the clean-up has not ended, or
    if a library has caught the exception.
    """
    stop, report = Stop(), sys.unraisablehook

    def interrupt(number: int, frame: FrameType | None) -> None:
        if not stop.reason:
            stop.ask(number, frame)
            _start_timer(limit_s, os._exit, 1)
            raise KeyboardInterrupt(stop.reason)

    # Python drops an exception that is raised in a __del__ method or in a callback of weakref, where a signal may
    # arrive too. The signal is then sent once more, a moment later.
    def send_again(ignored: Any) -> None:
        if stop.reason and isinstance(ignored.exc_value, KeyboardInterrupt):
            number, stop.reason = signal.Signals[stop.reason], ""
            _start_timer(0.05, os.kill, os.getpid(), number)
        else:
            report(ignored)

    _handle(interrupt)
    sys.unraisablehook = send_again


def _start_timer(seconds: float, function: Callable[..., Any], *arguments: int) -> None:
    timer = threading.Timer(seconds, function, arguments)
    timer.daemon = True
    timer.start()


def end_with_starters() -> None:
    """Under DVC this process receives SIGTERM when DVC ends, or when the flow that started DVC ends. Otherwise a stage
    would go on after its DVC was killed, and would write to the same files as the next run.
    """
    if "DVC_STAGE" in os.environ:
        starters = [os.getppid(), *filter(None, [int(os.environ.get(FLOW, 0))])]
        threading.Thread(target=_end_with, args=(starters,), daemon=True).start()


def _end_with(starters: list[int]) -> None:
    import psutil

    with suppress(psutil.NoSuchProcess):
        processes = [psutil.Process(pid) for pid in starters]
        while all(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes):
            time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)  # training writes a checkpoint first


def ignore() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def end_while_importing() -> None:
    """Called by the package of a module that `python -m` runs. Until the module sets its own handlers, a signal ends
    the process with one line, where Python would print the stack trace of the import that was interrupted.
    """
    if sys.argv[0] == "-m":  # Python's mark while it looks for the module to run
        _handle(_end_at_once)
        end_with_starters()


def handle_as_python_does() -> None:
    """Undoes end_while_importing, for a module that needs no handlers beyond Python's own."""
    for number in SIGNALS:
        if signal.getsignal(number) is _end_at_once:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def survive_closed_output() -> None:
    """Makes standard output and standard error drop text that nobody can read any more, because the terminal was closed
    or the reader of the pipe ended. A training that prints must still reach its checkpoint.

    A closed terminal has the same effect as SIGHUP. The kernel sends SIGHUP only to the process that leads the session,
    and `make` does not pass it on. A background job continues.
    """
    with suppress(OSError):  # raised if standard error is not the terminal of this session
        if os.tcgetpgrp(2) == os.getpgrp():
            threading.Thread(target=_wait_for_hangup, daemon=True).start()
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        stream.flush()
        raw: Any = _Forgiving(stream.fileno(), "wb", closefd=False)
        setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(raw), encoding=stream.encoding, errors=stream.errors,
                                            line_buffering=stream.line_buffering, write_through=stream.write_through))


def _wait_for_hangup() -> None:
    poll = select.poll()
    poll.register(2, 0)
    poll.poll()
    if callable(signal.getsignal(signal.SIGHUP)):
        os.kill(os.getpid(), signal.SIGHUP)


def _handle(handler: Handler) -> dict[signal.Signals, signal._HANDLER]:
    """Sets the handler for every signal that is not ignored. Returns the previous handlers."""
    return {number: signal.signal(number, handler) for number in SIGNALS
            if signal.getsignal(number) is not signal.SIG_IGN}


def _end_at_once(number: int, frame: FrameType | None) -> None:
    line = f"onediff: stopped by {signal.Signals(number).name} before any work; run the same command to start again\n"
    try:
        os.write(2, line.encode())
    finally:
        os._exit(128 + number)


class _Forgiving(io.FileIO):
    def write(self, data: bytes) -> int:  # type: ignore[override]
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EIO, errno.EPIPE):
                raise
            return len(data)
