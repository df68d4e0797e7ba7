"""Rolling checkpoints in scratch, and what became of the run: never one half-written, never the last good one lost."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from onediff.train.engine import Engine

KEEP = 2


def scratch_of(root: str, phase: str, contents: Any) -> Path:
    """The folder of one training run, keyed by everything that decides its result."""
    key = hashlib.sha256(json.dumps(contents, sort_keys=True, default=str).encode()).hexdigest()[:16]
    folder = Path(root) / f"{phase}-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(json.dumps(value) + "\n", encoding="utf-8")
    os.replace(part, path)


def write_status(folder: Path, state: str, step: int, reason: str = "") -> None:
    """state: running, preempted, failed, diverged or finished. An exit code does not survive DVC; this file does."""
    write_json(folder / "status.json", {"state": state, "step": step, "reason": reason})


def close_status(folder: Path) -> None:
    """A run that leaves by an error nobody foresaw is failed, not running; on a full disk the error itself must do."""
    known = json.loads((folder / "status.json").read_text(encoding="utf-8"))
    error = sys.exception()
    if error is not None and known["state"] == "running":
        with contextlib.suppress(OSError):
            write_status(folder, "failed", known["step"], " ".join(f"{type(error).__name__}: {error}".split())[:300])


def complete(folder: Path) -> list[Path]:
    """Checkpoints that were written to the end, oldest first."""
    return [path.parent for path in sorted(folder.glob("checkpoints/step-*/complete.json"))]


def save(engine: Engine, folder: Path, step: int, extra: dict[str, Any]) -> None:
    """Older checkpoints go only once this one is whole. Raises OSError with what to do if the disk is full."""
    tag = f"step-{step:07d}"
    target = folder / "checkpoints" / tag
    try:
        shutil.rmtree(target, ignore_errors=True)
        engine.save(str(folder / "checkpoints"), tag)
        if engine.rank == 0:
            write_json(target / "complete.json", {"step": step, **extra})
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        shutil.rmtree(target, ignore_errors=True)
        raise OSError(f"{target}: the checkpoint could not be written ({str(error).splitlines()[0]}); "
                      "free some space and start again: training goes on from the checkpoint before") from error
    for old in complete(folder)[:-KEEP]:
        shutil.rmtree(old)


def resume(engine: Engine, folder: Path) -> dict[str, Any] | None:
    """Loads the newest whole checkpoint; returns what was stored beside it, or None if there is none."""
    found = complete(folder)
    if not found:
        return None
    engine.load(str(found[-1].parent), found[-1].name)
    return json.loads((found[-1] / "complete.json").read_text())
