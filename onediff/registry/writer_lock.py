"""One writer at a time. MLflow has no compare-and-set, so the aliases of a store that machines share are changed by one
process alone; those of a database on this machine by one after the other.
"""

from __future__ import annotations

import fcntl
import getpass
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from onediff import tracking

WAIT_S = 600.0
_sole: ContextVar[bool] = ContextVar("sole_writer", default=False)
_inside: ContextVar[bool] = ContextVar("inside", default=False)  # this context holds the lock already


def shared() -> bool:
    """Whether other machines can reach the registry too: a server or a database other than SQLite."""
    return not tracking.uri().startswith("sqlite:")


@contextmanager
def sole_writer() -> Iterator[None]:
    """Says that nobody else changes a shared registry meanwhile: the deployments promote and rollback, which run one at
    a time, hold it. Who holds it wrongly is told when another was first, and changes nothing.
    """
    token = _sole.set(True)
    try:
        yield
    finally:
        _sole.reset(token)


def may_write() -> bool:
    return _sole.get() or not shared()


@contextmanager
def writing() -> Iterator[None]:
    """Around every change. Raises ValueError on a shared registry unless `sole_writer` is held."""
    if not may_write():
        raise ValueError(f"aliases at {tracking.where()} are changed by the deployments promote and rollback alone: "
                         "'onediff registry promote' submits to them")
    if shared() or _inside.get():
        yield
        return
    with _lock(Path(tracking.uri().removeprefix("sqlite:///") + ".lock")):
        token = _inside.set(True)
        try:
            yield
        finally:
            _inside.reset(token)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + WAIT_S
    with path.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ValueError(f"{path}: another process has been changing the registry for {WAIT_S:.0f} s; "
                                     "see what it does, or end it") from None
                time.sleep(0.05)
        yield  # closing the file, or dying, gives the lock back


def whoami() -> str:
    """user@machine, for the trail."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        user = "unknown"
    return f"{user}@{socket.gethostname()}"
