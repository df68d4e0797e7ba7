"""status.json of a run: rank 0 writes it, and the launcher reads it, perhaps on another node.

An exit code does not survive DVC; this file does.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from onediff.files import write_json

FINAL = "final"  # folder of the trained model in the run's folder


def write_status(folder: Path, state: str, step: int, reason: str = "") -> None:
    """Writes it on rank 0. `state`: running, preempted, failed, diverged or finished."""
    if os.environ.get("RANK", "0") == "0":
        write_json(folder / "status.json", {"state": state, "step": step, "reason": reason})


def read_status(folder: Path) -> dict[str, Any]:
    """state (one that rank 0 wrote, or `not started`), step and reason."""
    try:
        return dict(json.loads((folder / "status.json").read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {"state": "not started", "step": 0, "reason": ""}


@contextlib.contextmanager
def recorded_errors(folder: Path) -> Iterator[None]:
    """Marks a running phase that an error ends as failed, and one that a signal ends as preempted. On a full disk the
    status cannot be written, and only the error itself is raised.
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
    """Changes with every write, by the clock of the storage; 0 without status.json."""
    path = folder / "status.json"
    return path.stat().st_mtime_ns if path.exists() else 0


def is_finished(folder: Path) -> bool:
    """Whether everything that the stage fetches is there; run.json is what rank 0 writes last."""
    return read_status(folder)["state"] == "finished" and (folder / "run.json").exists()
