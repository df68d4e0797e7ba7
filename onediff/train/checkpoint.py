"""Rolling checkpoints in the scratch folder. A checkpoint is either complete or ignored, and old ones are deleted last.

A checkpoint holds the complete float32 value and both Adam moments of each trainable parameter, so training resumes on
any number of processes and at any ZeRO level. A checkpoint consists of safetensors files, which cannot contain code.
"""

import json
import shutil
from contextlib import ExitStack
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


def complete(folder: Path) -> list[Path]:
    """Return the folders of all checkpoints that were written completely and verified, oldest first."""
    return [path.parent for path in sorted(folder.glob("checkpoints/step-*/complete.json"))]


def save(engine: Engine, folder: Path, step: int, extra: dict[str, Any]) -> None:
    """Write a checkpoint of step `step`: each rank stores a share of the parameters, and rank 0 stores `extra` as JSON.

    Older checkpoints are deleted only after every rank has read back and verified the new files. Raises OSError on all
    ranks if any rank cannot write, for instance because the disk is full.
    """
    target = folder / "checkpoints" / f"step-{step:07d}"
    error: Exception | None = None
    try:
        if engine.rank == 0:
            shutil.rmtree(target, ignore_errors=True)
        torch.distributed.barrier()
        target.mkdir(parents=True, exist_ok=True)
        path = target / f"rank-{engine.rank:04d}.safetensors"
        share = _share(engine)
        save_file(share, path)
        with safe_open(path, "pt") as file:
            for name, value in share.items():
                if not torch.equal(file.get_tensor(name).view(torch.int32), value.view(torch.int32)):
                    raise OSError(f"the content of {path.name} differs from the tensors that were written to it")
    except (OSError, SafetensorError) as raised:  # The library safetensors reports a full disk as a SafetensorError.
        error = raised
    [failed] = engine.any_rank(error is not None)
    if failed:
        shutil.rmtree(target, ignore_errors=True)
        why = str(error).splitlines()[0] if error else "on another rank"
        raise NotWrittenError(f"{target}: the checkpoint could not be written ({why}); free some disk space and run "
                              "the same command again: training resumes from the previous checkpoint") from error
    if engine.rank == 0:
        write_json(target / "complete.json", {"step": step, "world": engine.world, "zero_level": engine.zero_level,
                                              "sizes": _sizes(target), **extra})
        for old in complete(folder)[:-KEEP]:
            shutil.rmtree(old)


def _share(engine: Engine) -> dict[str, Tensor]:
    """Return the tensors that this rank stores: for n ranks, every n-th trainable parameter with both Adam moments.

    All ranks must call this, because gathering a parameter that is sharded by ZeRO needs every rank.
    """
    return {f"{name}:{key}": parts[key].to("cpu", torch.float32, copy=True).contiguous()
            for number, (name, parts) in enumerate(engine.masters()) if number % engine.world == engine.rank
            for key in _PARTS}


def _sizes(target: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in sorted(target.glob("*.safetensors"))}


def newest(folder: Path) -> Path | None:
    """Return the folder of the newest checkpoint whose file sizes equal the recorded sizes, or None."""
    return next((path for path in reversed(complete(folder))
                 if json.loads((path / "complete.json").read_text())["sizes"] == _sizes(path)), None)


def best_steps(folder: Path) -> set[int]:
    """Return the steps whose weights were the best ones when a checkpoint was written; a run may resume from each."""
    stored = [json.loads((path / "complete.json").read_text()).get("best_step") for path in complete(folder)]
    return {step for step in stored if step is not None}


def resume(engine: Engine, folder: Path) -> dict[str, Any]:
    """Load the newest complete checkpoint into the engine and return the dict stored with it, which contains the step.

    Returns an empty dictionary if there is no checkpoint. Prints a line if the number of processes or the ZeRO level
    differs from the run that wrote it. Raises ValueError if the checkpoint belongs to a model with other parameters.
    """
    path = newest(folder)
    if path is None:
        return {}
    state = json.loads((path / "complete.json").read_text())
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(file, "pt")) for file in sorted(path.glob("*.safetensors"))]
        file_of = {key: file for file in files for key in file.keys()}  # noqa: SIM118
        _check_architecture(path, file_of, engine)
        engine.set_masters(state["step"], lambda name: {key: file_of[f"{name}:{key}"].get_tensor(f"{name}:{key}")
                                                        for key in _PARTS})
    if engine.rank == 0 and (state["world"], state["zero_level"]) != (engine.world, engine.zero_level):
        print(f"{path}: written by {state['world']} processes at ZeRO level {state['zero_level']}, resumed by "
              f"{engine.world} processes at level {engine.zero_level}: the batches are equal, but sums are rounded "
              "differently")
    return dict(state)


def _check_architecture(path: Path, file_of: dict[str, Any], engine: Engine) -> None:
    """Raise ValueError if the tensors of the checkpoint do not match the model's trainable parameters."""
    expected = {f"{name}:{key}": list(getattr(p, "ds_shape", p.shape)) for name, p in engine.learning.items()
                for key in _PARTS}
    stored = {key: list(file.get_slice(key).get_shape()) for key, file in file_of.items()}
    wrong = sorted(key for key in expected.keys() | stored.keys() if expected.get(key) != stored.get(key))
    if wrong:
        raise ValueError(f"{path}: a checkpoint of another architecture: {wrong[0]} has shape "
                         f"{stored.get(wrong[0], 'none (missing)')} in the checkpoint and "
                         f"{expected.get(wrong[0], 'none (missing)')} in the model ({len(wrong)} tensors differ); "
                         "delete the folder 'checkpoints' of this run to start training from the beginning")
