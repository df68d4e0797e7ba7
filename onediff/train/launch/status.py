"""status.json of a run as its launcher reads it: written by rank 0, perhaps on another node."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any


def read_status(folder: Path) -> dict[str, Any]:
    """state (one that rank 0 wrote, or `not started`), step and reason."""
    try:
        return dict(json.loads((folder / "status.json").read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {"state": "not started", "step": 0, "reason": ""}


def stamp(folder: Path) -> int:
    """Changes with every writing; by no clock but that of the storage."""
    try:
        return (folder / "status.json").stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def is_finished(folder: Path) -> bool:
    """Everything is there that the stage fetches; run.json is what rank 0 writes last."""
    return read_status(folder)["state"] == "finished" and (folder / "run.json").exists()


def settled(folder: Path, *, patience_s: float) -> dict[str, Any]:
    """status.json once it tells an end, or as it is after `patience_s`: shared storage shows it with delay."""
    end = time.monotonic() + patience_s
    while (status := read_status(folder))["state"] in ("running", "not started") and time.monotonic() < end:
        time.sleep(0.5)
    return status
