"""status.json, the file in which rank 0 records the state of a run, and from which the launcher reads it.

The state is in a file because DVC replaces the exit code of a stage, and because rank 0 may run on another node.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from onediff.files import write_json

FINAL = "final"  # the trained model is in this sub-folder of the run folder


def write_status(folder: Path, state: str, step: int, reason: str = "") -> None:
    """Write status.json if this is rank 0. `state` is running, preempted, failed, diverged or finished."""
    if os.environ.get("RANK", "0") == "0":
        write_json(folder / "status.json", {"state": state, "step": step, "reason": reason})


def read_status(folder: Path) -> dict[str, Any]:
    """Read state, step and reason from status.json; without this file the state is `not started`."""
    try:
        return dict(json.loads((folder / "status.json").read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {"state": "not started", "step": 0, "reason": ""}


@contextlib.contextmanager
def recorded_errors(folder: Path) -> Iterator[None]:
    """Context manager that writes to status.json: state `failed` after an error, `preempted` after a signal.

    A state that the body of the `with` statement has already written, such as `diverged`, is kept. The error is raised
    again in every case, also when the disk is full and status.json cannot be written.
    """
    try:
        yield
    except BaseException as error:
        status = read_status(folder)
        if status["state"] == "running":
            state, reason = "failed", " ".join(f"{type(error).__name__}: {error}".split())[:300]
            if isinstance(error, KeyboardInterrupt):
                state, reason = "preempted", str(error)
            with contextlib.suppress(OSError):
                write_status(folder, state, status["step"], reason)
        raise


def modified_ns(folder: Path) -> int:
    """Return the modification time of status.json in nanoseconds, or 0 if the file does not exist."""
    path = folder / "status.json"
    return path.stat().st_mtime_ns if path.exists() else 0


def is_finished(folder: Path) -> bool:
    """Check whether all results of the run are written. Rank 0 writes run.json last."""
    return read_status(folder)["state"] == "finished" and (folder / "run.json").exists()
