"""`fit`: one loop for both phases, top to bottom."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from onediff.config import Phase, Runtime
from onediff.model.onediff import IGNORED, OneDiffForConditionalGeneration
from onediff.train import checkpoint
from onediff.train.engine import Engine

Log = Callable[[int, dict[str, float]], None]


@dataclass
class Stop:
    """Set by SIGTERM: finish the step, write a checkpoint, end."""

    asked: bool = False
    before: Any = field(default=None, repr=False)

    def __enter__(self) -> Stop:
        self.before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self.before)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True


def rate_factor(step: int, steps: int, warmup: float) -> float:
    """Linear warm-up over a share of the steps, then half a cosine to 0."""
    start = max(1, round(steps * warmup))
    if step < start:
        return (step + 1) / start
    return 0.5 * (1 + math.cos(math.pi * (step - start) / max(1, steps - start)))


def fit(model: OneDiffForConditionalGeneration, phase: Phase, runtime: Runtime, *, name: str, steps: int, folder: Path,
        micro_batches: Callable[[int, int, int], list[dict[str, Tensor]]], num_micro: int, log: Log,
        validate: Callable[[], float] | None) -> dict[str, Any]:
    """Trains `model` in place and leaves it at its best on `validate` (higher is better; None: at its last step).

    micro_batches(step, rank, world) are this rank's tensors of a step. Resumes from `folder` if a run was cut short
    there. Raises ValueError when the loss is not finite or SIGTERM asked to stop, OSError when a checkpoint cannot be
    written.
    """
    engine = Engine(model, phase, runtime, micro_batches=num_micro)
    kept = checkpoint.resume(engine, folder) or {"step": 0, "best": None, "best_step": None}
    rewind(folder / "curve.jsonl", kept["step"])
    started = saved = time.monotonic()
    pairs_done, step = 0, kept["step"]
    model.train()
    with Stop() as stop, tqdm(total=steps, initial=step, desc=name, unit="step") as progress:
        for step in range(kept["step"], steps):
            engine.set_rate(rate_factor(step, steps, phase.warmup))
            batches = [{k: v.to(engine.device) for k, v in batch.items()}
                       for batch in micro_batches(step, engine.rank, engine.world)]
            answers = engine.count_on_all_ranks(
                sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in batches))
            total = torch.zeros((), device=engine.device)
            for batch in batches:
                total += engine.backward(batch, answers)
            loss = engine.sum_on_all_ranks(total)
            if not math.isfinite(loss):
                checkpoint.write_status(folder, "diverged", step, f"loss {loss} at step {step}")
                raise ValueError(f"{name}: the loss became {loss} at step {step}; "
                                 f"lower the learning rates in params.yaml ({folder})")
            engine.step()
            pairs_done += phase.batch_size
            line = {"loss": loss, "lr": rate_factor(step, steps, phase.warmup), "grad_norm": engine.grad_norm,
                    "pairs_per_s": pairs_done / (time.monotonic() - started), "seconds": time.monotonic() - started}
            note(folder, step, line, log)
            progress.set_postfix(loss=f"{loss:.3f}", refresh=False)
            progress.update()
            if validate and phase.validate_every and ((step + 1) % phase.validate_every == 0 or step + 1 == steps):
                kept = keep_best(model, folder, kept, step=step, score=judged(model, validate), log=log)
            if stop.asked or time.monotonic() - saved > runtime.checkpoint_every_s:
                checkpoint.save(engine, folder, step + 1, {"best": kept["best"], "best_step": kept["best_step"]})
                checkpoint.write_status(folder, "running", step + 1)
                saved = time.monotonic()
            if stop.asked:
                checkpoint.write_status(folder, "preempted", step + 1, "SIGTERM")
                raise ValueError(f"{name}: stopped by SIGTERM after step {step + 1}; "
                                 "the same command goes on from there")
    engine.close()
    if kept["best_step"] is not None:
        model.load_state_dict(load_file(folder / "best" / f"step-{kept['best_step']:07d}.safetensors"), strict=False)
    return {"steps": steps, "best": kept["best"], "best_step": kept["best_step"], "seconds": time.monotonic() - started,
            "pairs_per_s": pairs_done / max(time.monotonic() - started, 1e-9)}


def judged(model: OneDiffForConditionalGeneration, validate: Callable[[], float]) -> float:
    model.eval()
    try:
        return validate()
    finally:
        model.train()


def keep_best(model: OneDiffForConditionalGeneration, folder: Path, kept: dict[str, Any], *, step: int,
              score: float, log: Log) -> dict[str, Any]:
    """Stores what has learned if it is better than before.

    The file is named by its step, so a resumed run finds the one it knows.
    """
    note(folder, step, {"val_CIDEr": score}, log)
    if kept["best"] is not None and score <= kept["best"]:
        return kept
    (folder / "best").mkdir(exist_ok=True)
    learned = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad}
    path = folder / "best" / f"step-{step + 1:07d}.safetensors"
    save_file(learned, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)
    return kept | {"best": score, "best_step": step + 1}


def note(folder: Path, step: int, values: dict[str, float], log: Log) -> None:
    """One line in the curve on disk, then whoever listens."""
    with (folder / "curve.jsonl").open("a", encoding="utf-8") as curve:
        curve.write(json.dumps({"step": step} | {key: round(value, 6) for key, value in values.items()}) + "\n")
    log(step, values)


def rewind(curve: Path, step: int) -> None:
    """Forgets the lines of steps that will be run again."""
    if curve.exists():
        lines = [line for line in curve.read_text(encoding="utf-8").splitlines()
                 if line.endswith("}") and json.loads(line)["step"] < step]
        curve.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
