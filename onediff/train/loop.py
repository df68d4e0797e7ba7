"""`fit`: one loop for both phases, to be read from top to bottom."""

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
from onediff.data.batches.corpus import Corpus
from onediff.data.batches.loader import Batch
from onediff.data.batches.sampling import RowSampler
from onediff.files import new_file, write_json
from onediff.inputs.processing import OneDiffProcessor
from onediff.interrupts import Stop, postponed
from onediff.model.onediff import OneDiffForConditionalGeneration
from onediff.train import checkpoint, lora
from onediff.train.engine import Engine
from onediff.train.speed import COUNTED, Meter, counts_of
from onediff.train.status import write_status

Log = Callable[[int, dict[str, float]], None]


@dataclass(frozen=True)
class Validation:
    """Chooses the best step: `generate_captions(numbers)` gives one caption for each of `num_pairs` pairs that is named
    by its number, and `score` rates the captions of all pairs.
    """

    every_steps: int
    num_pairs: int
    generate_captions: Callable[[list[int]], list[str]]
    score: Callable[[list[str]], float]


@dataclass(frozen=True)
class TrainingRun:
    """One run of a phase. `folder` is its folder in scratch; `rows(step)` are the rows of a step's batch on all ranks.

    Without `validation` the last step counts as the best.
    """

    name: str
    phase: Phase
    runtime: Runtime
    folder: Path
    model: OneDiffForConditionalGeneration
    processor: OneDiffProcessor
    corpus: Corpus
    rows: RowSampler
    num_samples: int
    validation: Validation | None = None

    @property
    def num_steps(self) -> int:
        return steps_of(self.phase, self.num_samples)


@dataclass(frozen=True)
class Trained:
    """`weights`: of the complete model at its best step, with adapters merged; None on ranks other than 0."""

    summary: dict[str, Any]
    weights: dict[str, Tensor] | None


def steps_of(phase: Phase, num_samples: int) -> int:
    if phase.steps is not None:
        return phase.steps
    return max(1, math.ceil((phase.epochs or 0) * num_samples / phase.batch_size))


def rate_factor(step: int, steps: int, warmup: float) -> float:
    """Linear warm-up over a share of the steps, then half a cosine to 0."""
    start = max(1, round(steps * warmup))
    if step < start:
        return (step + 1) / start
    return 0.5 * (1 + math.cos(math.pi * (step - start) / max(1, steps - start)))


def fit(run: TrainingRun, batches: Callable[[int, int], Iterator[list[Batch]]], log: Log, meter: Meter) -> Trained:
    """Trains the model of the run in place, and returns its weights at the best step.

    batches(first, rank) yields the micro-batches of a rank, for step `first` and each later step. If an earlier run was
    interrupted, training resumes from its newest checkpoint. Raises ValueError when the loss is not finite, when memory
    runs out or when a signal asks this process to end, and OSError when a checkpoint cannot be written.
    """
    engine = Engine(run.model, run.phase, run.runtime)
    state = checkpoint.resume(engine, run.folder)
    first, best = state.get("step", 0), {"best": state.get("best"), "best_step": state.get("best_step")}
    curve = CurveWriter(run.folder, log, first_step=first) if engine.rank == 0 else None
    coming = batches(first, engine.rank)
    saved = time.monotonic()
    run.model.train()
    with (postponed(Stop()) as stop,
          tqdm(total=run.num_steps, initial=first, desc=run.name, unit="step", disable=engine.rank > 0) as bar):
        for step in range(first, run.num_steps):
            started = time.monotonic()
            micro_batches = next(coming)
            waited_s = time.monotonic() - started
            counts = engine.sums(counts_of(micro_batches))
            num_answer_tokens = counts[COUNTED.index("answer_tokens")]
            factor = rate_factor(step, run.num_steps, run.phase.warmup)
            engine.set_rate(factor)
            rank_loss = torch.zeros((), device=engine.device)
            with explain_out_of_memory(run.name, run.phase, run.runtime):
                for batch in micro_batches:
                    rank_loss += engine.backward(batch, num_answer_tokens)
            loss = float(engine.sums([rank_loss]))
            if not math.isfinite(loss):
                raise diverged(run, step, loss)
            engine.step()
            meter.add(counts, waited_s)
            if curve:
                curve.write(step, {"loss": loss, "lr": factor, "grad_norm": engine.grad_norm, **meter.line(),
                                   "seconds": meter.seconds})
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()
            if run.validation and ((step + 1) % run.validation.every_steps == 0 or step + 1 == run.num_steps):
                score = validate(engine, run.validation)
                if curve:
                    curve.write(step, {"val_CIDEr": score})
                if best["best"] is None or score > best["best"]:
                    save_best(engine, best_file(run.folder, step + 1))
                    best = {"best": score, "best_step": step + 1}
            stopped, due = engine.any_rank(bool(stop.reason), time.monotonic() - saved > run.runtime.checkpoint_every_s)
            if stopped or due:
                checkpoint.save(engine, run.folder, step + 1, best)
                write_status(run.folder, "running", step + 1)
                saved = time.monotonic()
            if stopped:
                reason = stop.reason or "a signal to another rank"
                write_status(run.folder, "preempted", step + 1, reason)
                raise ValueError(f"{run.name}: stopped by {reason}; the checkpoint of step {step + 1} is saved, and "
                                 "the same command goes on from there")
    weights = export(engine, run, best["best_step"])
    engine.close()
    return Trained({"steps": run.num_steps, **best, "seconds": meter.seconds, **meter.summary()}, weights)


class CurveWriter:
    """Writes one line for each step to curve.jsonl, and passes the values to `log`; for rank 0.

    On resume, it drops the lines at or after the checkpoint's step.
    """

    def __init__(self, folder: Path, log: Log, *, first_step: int) -> None:
        self.path, self.log = folder / "curve.jsonl", log
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        self.path.write_text("".join(f"{line}\n" for line in lines if line.endswith("}")
                                     and json.loads(line)["step"] < first_step), encoding="utf-8")

    def write(self, step: int, values: dict[str, float]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step} | {key: round(value, 6) for key, value in values.items()}) + "\n")
        self.log(step, values)


def diverged(run: TrainingRun, step: int, loss: float) -> ValueError:
    """The error for a loss that is not finite. The names of all rows of the batch are written to diverged.json; the
    last checkpoint stays.
    """
    names = [row.name for row in run.rows(step)]
    write_status(run.folder, "diverged", step, f"loss {loss} at step {step}")
    write_json(run.folder / "diverged.json", {"step": step, "rows": names})
    few = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return ValueError(f"{run.name}: the loss became {loss} at step {step}, on rows {few or 'unnamed'} "
                      f"({run.folder}/diverged.json); look at them, or lower the learning rates in params.yaml")


@contextmanager
def explain_out_of_memory(name: str, phase: Phase, runtime: Runtime) -> Iterator[None]:
    """Raises ValueError with what to change in runtime.yaml in place of an error for want of memory."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        size = runtime.micro_batch_size or phase.batch_size // runtime.num_ranks
        cures = [cure for cure, helps in (
            (f"micro_batch_size below {size}", size > 1),
            ("checkpoint_activations: true", not runtime.checkpoint_activations),
            (f"zero_level {runtime.zero_level + 1} on several GPUs", runtime.zero_level < 3),
            ("offload: optimizer", runtime.offload == "none")) if helps]
        raise ValueError(f"{name}: out of memory ({str(error).splitlines()[0][:200]}); in runtime.yaml set "
                         f"{', or '.join(cures) or 'more gpus'}: 'onediff plan' tells what fits") from error


def validate(engine: Engine, validation: Validation) -> float:
    """The score of the model as it is now, on all ranks."""
    engine.model.eval()
    captions = engine.gather_texts(validation.generate_captions, validation.num_pairs)
    engine.model.train()
    return validation.score(captions)


def best_file(folder: Path, step: int) -> Path:
    """Named by its step, so that a resumed run reads the one that its checkpoint knows."""
    return folder / "best" / f"step-{step:07d}.safetensors"


def save_best(engine: Engine, path: Path) -> None:
    """Saves the parameters that learn. All ranks take part; rank 0 writes."""
    weights = engine.learned_weights()
    if weights is not None:
        with new_file(path) as part:
            save_file({name: value.contiguous() for name, value in weights.items()}, part)


def export(engine: Engine, run: TrainingRun, best_step: int | None) -> dict[str, Tensor] | None:
    """The weights of the complete model, in which what learned is that of the best step; None on ranks other than 0."""
    weights = engine.model_weights()
    if weights is not None and best_step is not None:
        best = load_file(best_file(run.folder, best_step))
        best_of = {id(weights[name]): value for name, value in best.items()}  # under each name of a shared weight
        weights = {name: best_of.get(id(value), value) for name, value in weights.items()}
    return lora.merged(weights, run.phase.lora) if weights is not None and run.phase.lora else weights
