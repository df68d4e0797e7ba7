"""`fit`: one loop for both phases, top to bottom."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from onediff.config import Phase, Runtime
from onediff.files import new_file, write_json
from onediff.interrupts import Stop, postponed
from onediff.model.onediff import OneDiffForConditionalGeneration
from onediff.train import checkpoint, lora
from onediff.train.engine import Engine
from onediff.train.speed import Meter, counts_of

Log = Callable[[int, dict[str, float]], None]
Batches = Callable[[int, int, int], Iterator[list[dict[str, Tensor]]]]


@dataclass(frozen=True)
class Judge:
    """What picks the best step: say(numbers) gives a text for each of `num` items, score all texts' worth."""

    num: int
    say: Callable[[list[int]], list[str]]
    score: Callable[[list[str]], float]


@dataclass(frozen=True)
class Fitted:
    """weights: of the whole model, adapters merged; on rank 0 alone."""

    summary: dict[str, Any]
    weights: dict[str, Tensor] | None


def rate_factor(step: int, steps: int, warmup: float) -> float:
    """Linear warm-up over a share of the steps, then half a cosine to 0."""
    start = max(1, round(steps * warmup))
    if step < start:
        return (step + 1) / start
    return 0.5 * (1 + math.cos(math.pi * (step - start) / max(1, steps - start)))


def fit(model: OneDiffForConditionalGeneration, phase: Phase, runtime: Runtime, *, name: str, steps: int, folder: Path,
        batches: Batches, num_micro: int, log: Log, judge: Judge | None = None, meter: Meter | None = None,
        names: Callable[[int], list[str]] = lambda step: []) -> Fitted:
    """Trains `model` in place; gives its weights at their best by `judge` (None: at the last step).

    batches(first, rank, world) yields this rank's micro-batches of step `first` and on; names(step) tells its rows.
    Resumes from `folder` if a run was cut short there. Raises ValueError when the loss is not finite, memory runs out
    or a signal asked to stop, OSError when a checkpoint cannot be written.
    """
    engine, meter = Engine(model, phase, runtime, micro_batches=num_micro), meter or Meter()
    kept = checkpoint.resume(engine, folder) or {"step": 0, "best": None, "best_step": None}
    note = Notes(folder, log, first=kept["step"], writes=engine.rank == 0)
    coming = batches(kept["step"], engine.rank, engine.world)
    saved = time.monotonic()
    model.train()
    with (postponed(Stop()) as stop,
          tqdm(total=steps, initial=kept["step"], desc=name, unit="step", disable=engine.rank > 0) as bar):
        for step in range(kept["step"], steps):
            waited = time.monotonic()
            micro = next(coming)
            waited = time.monotonic() - waited
            counts = engine.sums(counts_of(micro))
            engine.set_rate(rate_factor(step, steps, phase.warmup))
            total = torch.zeros((), device=engine.device)
            with memory_told(name, phase, runtime):
                for batch in micro:
                    total += engine.backward({k: v.to(engine.device, non_blocking=True) for k, v in batch.items()},
                                             counts[-1])
            loss = float(engine.sums([total]))
            if not math.isfinite(loss):
                raise diverged(folder, name, step, loss, names(step))
            engine.step()
            meter.add(counts, waited)
            note(step, {"loss": loss, "lr": rate_factor(step, steps, phase.warmup), "grad_norm": engine.grad_norm,
                        **meter.line(), "seconds": meter.seconds})
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()
            if judge and phase.validate_every and ((step + 1) % phase.validate_every == 0 or step + 1 == steps):
                kept |= keep_best(engine, folder, kept, step=step, score=judged(engine, judge), note=note)
            stopped, due = engine.any_rank(bool(stop.reason), time.monotonic() - saved > runtime.checkpoint_every_s)
            if stopped or due:
                checkpoint.save(engine, folder, step + 1, {"best": kept["best"], "best_step": kept["best_step"]})
                checkpoint.write_status(folder, "running", step + 1)
                saved = time.monotonic()
            if stopped:
                reason = stop.reason or "a signal to another rank"
                checkpoint.write_status(folder, "preempted", step + 1, reason)
                raise ValueError(f"{name}: stopped by {reason}; the checkpoint of step {step + 1} is saved, and the "
                                 "same command goes on from there")
    weights = export(engine, phase, folder, kept["best_step"])
    engine.close()
    return Fitted({"steps": steps, "best": kept["best"], "best_step": kept["best_step"], "seconds": meter.seconds,
                   **meter.summary()}, weights)


def judged(engine: Engine, judge: Judge) -> float:
    engine.model.eval()
    try:
        return judge.score(engine.spread(judge.say, judge.num))
    finally:
        engine.model.train()


def diverged(folder: Path, name: str, step: int, loss: float, rows: list[str]) -> ValueError:
    """The last good state stays; the rows of the batch are named, all of them in a file."""
    checkpoint.write_status(folder, "diverged", step, f"loss {loss} at step {step}")
    write_json(folder / "diverged.json", {"step": step, "rows": rows})
    few = ", ".join(rows[:3]) + (f" and {len(rows) - 3} more" if len(rows) > 3 else "")
    return ValueError(f"{name}: the loss became {loss} at step {step}, on rows {few or 'unnamed'} "
                      f"({folder}/diverged.json); look at them, or lower the learning rates in params.yaml")


@contextmanager
def memory_told(name: str, phase: Phase, runtime: Runtime) -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        size = runtime.micro_batch_size or phase.batch_size // runtime.num_ranks
        cures = [f"micro_batch_size below {size}"] if size > 1 else []
        cures += [] if runtime.checkpoint_activations else ["checkpoint_activations: true"]
        cures += [f"zero_level {runtime.zero_level + 1} on several GPUs"] if runtime.zero_level < 3 else []
        cures += ["offload: optimizer"] if runtime.offload == "none" else []
        raise ValueError(f"{name}: out of memory ({str(error).splitlines()[0][:200]}); in runtime.yaml set "
                         f"{', or '.join(cures) or 'more gpus'}: 'onediff plan' tells what fits") from error


def keep_best(engine: Engine, folder: Path, kept: dict[str, Any], *, step: int, score: float,
              note: Notes) -> dict[str, Any]:
    """Stores what has learned if it is better than before.

    The file is named by its step, so a resumed run finds the one it knows.
    """
    note(step, {"val_CIDEr": score})
    if kept["best"] is not None and score <= kept["best"]:
        return {}
    learned = engine.whole(only_learned=True)
    if learned is not None:
        path = best_file(folder, step + 1)
        with new_file(path) as part:
            save_file({name: value.contiguous() for name, value in learned.items()}, part)
    return {"best": score, "best_step": step + 1}


def best_file(folder: Path, step: int) -> Path:
    return folder / "best" / f"step-{step:07d}.safetensors"


def export(engine: Engine, phase: Phase, folder: Path, best_step: int | None) -> dict[str, Tensor] | None:
    """The whole model's weights, those that learned at the best step; on rank 0 alone."""
    weights = engine.whole(only_learned=False)
    if weights is not None and best_step is not None:
        best = load_file(best_file(folder, best_step))
        instead = {id(weights[name]): value for name, value in best.items()}  # under each name of a shared weight
        weights = {name: instead.get(id(value), value) for name, value in weights.items()}
    return lora.merged(weights, phase.lora) if weights is not None and phase.lora else weights


class Notes:
    """One line a step in the curve on disk, then whoever listens; a resumed run forgets the lines it will write again.
    """

    def __init__(self, folder: Path, log: Log, *, first: int, writes: bool) -> None:
        self.curve, self.log, self.writes = folder / "curve.jsonl", log, writes
        if writes:
            known = self.curve.read_text(encoding="utf-8").splitlines() if self.curve.exists() else []
            self.curve.write_text("".join(f"{line}\n" for line in known if line.endswith("}")
                                          and json.loads(line)["step"] < first), encoding="utf-8")

    def __call__(self, step: int, values: dict[str, float]) -> None:
        if self.writes:
            with self.curve.open("a", encoding="utf-8") as curve:
                curve.write(json.dumps({"step": step} | {key: round(value, 6) for key, value in values.items()}) + "\n")
            self.log(step, values)
