"""Rolling checkpoints in scratch, and what became of the run: never one half-written, never the last good one lost.

A checkpoint holds, for each parameter that learns, its float32 value and Adam's moments, whole: so it is resumed on any
number of processes and at any ZeRO level. Safetensors alone: there is nothing in it that could run.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from onediff.files import NotWrittenError, write_json
from onediff.train.engine import MOMENTS, Engine

KEEP = 2
_PARTS = ("value", *MOMENTS)


def scratch_of(root: str, phase: str, contents: Any) -> Path:
    """The folder of one training run, keyed by everything that decides its result."""
    key = hashlib.sha256(json.dumps(contents, sort_keys=True, default=str).encode()).hexdigest()[:16]
    folder = Path(root).absolute() / f"{phase}-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Holds the run's folder for this process. Raises ValueError if another one trains there."""
    with (folder / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(f"{folder}: another run trains here (process {file.read().strip() or 'unknown'}): two "
                             "would spoil each other's checkpoints; wait for it or stop it") from None
        file.truncate(0)
        file.write(f"{os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def write_status(folder: Path, state: str, step: int, reason: str = "") -> None:
    """state: running, preempted, failed, diverged or finished. An exit code does not survive DVC; this file does."""
    if os.environ.get("RANK", "0") == "0":
        write_json(folder / "status.json", {"state": state, "step": step, "reason": reason})


def close_status(folder: Path) -> None:
    """Marks a run that an error ends as failed, and one that a signal ends as preempted. On a full disk the error alone
    says so.
    """
    known = json.loads((folder / "status.json").read_text(encoding="utf-8"))
    error = sys.exception()
    if error is not None and known["state"] == "running":
        with contextlib.suppress(OSError):
            if isinstance(error, KeyboardInterrupt):
                write_status(folder, "preempted", known["step"], str(error))
            else:
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                write_status(folder, "failed", known["step"], reason)


def complete(folder: Path) -> list[Path]:
    """Checkpoints that were written to the end and verified, oldest first."""
    return [path.parent for path in sorted(folder.glob("checkpoints/step-*/complete.json"))]


def save(engine: Engine, folder: Path, step: int, extra: dict[str, Any]) -> None:
    """Every rank writes its share; older checkpoints go only once this one is whole and was read back.

    Raises OSError with what to do if the disk is full.
    """
    target = folder / "checkpoints" / f"step-{step:07d}"
    error: Exception | None = None
    try:
        if engine.rank == 0:
            shutil.rmtree(target, ignore_errors=True)
        (folder / "checkpoints").mkdir(exist_ok=True)
        engine.wait()
        target.mkdir(exist_ok=True)
        path = target / f"rank-{engine.rank:04d}.safetensors"
        mine = _share(engine)
        save_file(mine, path)
        _verify(path, mine)
    except (OSError, SafetensorError) as raised:  # safetensors reports a full disk as its own error
        error = raised
    [failed] = engine.any_rank(error is not None)
    if failed:
        shutil.rmtree(target, ignore_errors=True)
        why = str(error).splitlines()[0] if error else "on another rank"
        raise NotWrittenError(f"{target}: the checkpoint could not be written ({why}); free some space and start "
                              "again: training goes on from the checkpoint before") from error
    if engine.rank == 0:
        write_json(target / "complete.json", {"step": step, "world": engine.world, "zero_level": engine.zero_level,
                                              "sizes": _sizes(target), **extra})
        for old in complete(folder)[:-KEEP]:
            shutil.rmtree(old)


def _share(engine: Engine) -> dict[str, Tensor]:
    """Every world-th parameter that learns, in the CPU's memory; all ranks take part in making each whole."""
    mine: dict[str, Tensor] = {}
    for number, (name, parts) in enumerate(engine.masters()):
        if number % engine.world == engine.rank:
            mine |= {f"{name}:{key}": parts[key].to("cpu", torch.float32, copy=True).contiguous() for key in _PARTS}
    return mine


def _verify(path: Path, written: dict[str, Tensor]) -> None:
    with safe_open(path, "pt") as file:
        for name, value in written.items():
            if not torch.equal(file.get_tensor(name).view(torch.int32), value.view(torch.int32)):
                raise OSError(f"{path.name} does not read back as it was written")


def _sizes(target: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in sorted(target.glob("*.safetensors"))}


def newest(folder: Path) -> Path | None:
    """The newest checkpoint that is whole: its files are there in the sizes that were noted."""
    for path in reversed(complete(folder)):
        if json.loads((path / "complete.json").read_text())["sizes"] == _sizes(path):
            return path
    return None


def resume(engine: Engine, folder: Path) -> dict[str, Any] | None:
    """Loads the newest whole checkpoint; returns what was stored beside it, or None if there is none.

    Says so where the number of processes or the ZeRO level is another than before. Raises ValueError if it is of
    another architecture.
    """
    found = newest(folder)
    if found is None:
        return None
    kept = json.loads((found / "complete.json").read_text())
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, "pt")) for path in sorted(found.glob("*.safetensors"))]
        where = {key: file for file in files for key in file.keys()}  # noqa: SIM118
        _check(found, where, engine)
        engine.set_masters(kept["step"], lambda name: {key: where[f"{name}:{key}"].get_tensor(f"{name}:{key}")
                                                       for key in _PARTS})
    if engine.rank == 0 and (kept["world"], kept["zero_level"]) != (engine.world, engine.zero_level):
        print(f"{found}: written by {kept['world']} processes at ZeRO level {kept['zero_level']}, goes on with "
              f"{engine.world} at level {engine.zero_level}: the same batches, sums in another order")
    return kept


def _check(found: Path, where: dict[str, Any], engine: Engine) -> None:
    wanted = {f"{name}:{key}": list(getattr(p, "ds_shape", p.shape)) for name, p in engine.learning.items()
              for key in _PARTS}
    shapes = {key: list(file.get_slice(key).get_shape()) for key, file in where.items()}
    wrong = sorted(key for key in wanted.keys() | shapes.keys() if wanted.get(key) != shapes.get(key))
    if wrong:
        there, here = shapes.get(wrong[0], "not in it"), wanted.get(wrong[0], "not in the model")
        raise ValueError(f"{found}: a checkpoint of another architecture: {wrong[0]} is {there}, needs {here} "
                         f"({len(wrong)} differ); remove the folder to begin anew")
