"""The training loop of both phases: `fit` trains the model of a `TrainingRun` and returns the weights of the best step.

`fit` comes first after the dataclasses that describe a run. The functions that it calls follow in the order of use.
"""

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
from onediff.files import new_file, write_json, write_jsonl
from onediff.inputs.processing import OneDiffProcessor
from onediff.interrupts import Stop, postponed
from onediff.model.onediff import OneDiffForConditionalGeneration
from onediff.text_files import parse_lines
from onediff.train import checkpoint, lora
from onediff.train.engine import Engine
from onediff.train.speed import COUNTED, Meter, counts_of
from onediff.train.status import write_status

LOSS_UNITS = {"tokens": "answer_tokens", "samples": "answered_rows"}  # what counts equally, by the setting `loss`

Log = Callable[[int, dict[str, float]], None]


@dataclass(frozen=True)
class Validation:
    """How to score the model during training, so that the step with the highest score can be kept.

    Every `every_steps` steps, `generate_captions(numbers)` returns one caption for each validation pair, where
    `numbers` are indices below `num_pairs`. `score` then rates the captions of all pairs with one number.
    """

    every_steps: int
    num_pairs: int
    generate_captions: Callable[[list[int]], list[str]]
    score: Callable[[list[str]], float]


@dataclass(frozen=True)
class TrainingRun:
    """One run of a training phase: the model, the data, the settings, and the folder for checkpoints and results.

    `folder` is inside the scratch folder. `rows(step)` returns the rows of the batch of one step, for all ranks
    together. Without `validation`, the weights of the last step are the result.
    """

    name: str
    phase: Phase
    runtime: Runtime
    folder: Path
    model: OneDiffForConditionalGeneration
    processor: OneDiffProcessor
    corpus: Corpus
    rows: RowSampler
    validation: Validation | None = None

    @property
    def num_steps(self) -> int:
        return steps_of(self.phase)


@dataclass(frozen=True)
class Trained:
    """The result of training: a summary, and the weights of the complete model at the best step.

    LoRA adapters are merged into `weights`. On every rank except rank 0, `weights` is None.
    """

    summary: dict[str, Any]
    weights: dict[str, Tensor] | None


def fit(run: TrainingRun, batches: Callable[[int, int], Iterator[list[Batch]]], log: Log, meter: Meter) -> Trained:
    """Train the model of `run` in place and return the weights of the best step.

    `batches(first_step, rank)` yields the micro-batches of one rank, for `first_step` and every later step. If an
    earlier run was interrupted, training resumes from the newest checkpoint. Raises ValueError if the loss is not
    finite, if memory runs out or if a signal stops this process, and OSError if a checkpoint cannot be written.
    """
    engine = Engine(run.model, run.phase, run.runtime)
    state = checkpoint.resume(engine, run.folder)
    first_step, best_score, best_step = state.get("step", 0), state.get("best"), state.get("best_step")
    curve = CurveWriter(run.folder, log, first_step=first_step) if engine.rank == 0 else None
    batch_iterator = batches(first_step, engine.rank)
    last_checkpoint = time.monotonic()
    run.model.train()
    with (postponed(Stop()) as stop,
          tqdm(total=run.num_steps, initial=first_step, desc=run.name, unit="step", disable=engine.rank > 0) as bar):
        for step in range(first_step, run.num_steps):
            load_start = time.monotonic()
            micro_batches = next(batch_iterator)
            loader_wait_s = time.monotonic() - load_start

            # Each loss is divided by the numbers of all ranks, so the number of GPUs does not change the result.
            counts = engine.sums(counts_of(micro_batches))
            total_weight, num_rows = (counts[COUNTED.index(name)] for name in (LOSS_UNITS[run.phase.loss], "rows"))
            lr_factor = rate_factor(step, run.num_steps, run.phase.warmup)
            engine.set_rate(lr_factor)
            rank_losses = torch.zeros(1 + len(engine.weights), device=engine.device)
            with explain_out_of_memory(run.name, run.phase, run.runtime):
                for batch in micro_batches:
                    rank_losses += engine.backward(batch, total_weight, num_rows)
            losses = dict(zip(("loss", *engine.weights), engine.sums(rank_losses.tolist()).tolist(), strict=True))
            if not math.isfinite(sum(losses.values())):
                raise diverged(run, step, sum(losses.values()))
            with explain_out_of_memory(run.name, run.phase, run.runtime):  # The first step allocates optimizer states.
                engine.step()

            meter.add(counts, loader_wait_s)
            if curve:
                curve.write(step, {**losses, "lr": lr_factor, "grad_norm": engine.grad_norm, **meter.line(),
                                   "seconds": meter.seconds})
            bar.set_postfix(loss=f"{losses['loss']:.3f}", refresh=False)
            bar.update()

            num_done = step + 1
            if run.validation and (num_done % run.validation.every_steps == 0 or num_done == run.num_steps):
                score = validate(engine, run.validation)
                if curve:
                    curve.write(step, {"val_CIDEr": score})
                if best_score is None or score > best_score:
                    save_best(engine, best_file(run.folder, num_done))
                    best_score, best_step = score, num_done
                    remove_superseded(engine, run.folder, best_step)

            # All ranks must save at the same step, because each rank writes a part of the checkpoint.
            is_due = time.monotonic() - last_checkpoint > run.runtime.checkpoint_every_s
            is_stopped, is_due = engine.any_rank(bool(stop.reason), is_due)
            if is_stopped or is_due:
                checkpoint.save(engine, run.folder, num_done, {"best": best_score, "best_step": best_step})
                remove_superseded(engine, run.folder, best_step)
                write_status(run.folder, "running", num_done)
                last_checkpoint = time.monotonic()
            if is_stopped:
                raise preempted(run, num_done, stop.reason or "a signal to another rank")
    weights = export(engine, run, best_step)
    engine.close()
    summary = {"steps": run.num_steps, "best": best_score, "best_step": best_step, "seconds": meter.seconds}
    return Trained(summary | meter.summary(), weights)


def steps_of(phase: Phase) -> int:
    """Return the number of optimizer steps of a phase. The mixture states the rows of one epoch, in thousands."""
    if phase.steps is not None:
        return phase.steps
    # A small tolerance, because 1000 * 279.064 can be a little above the integer that is meant.
    return max(1, math.ceil((phase.epochs or 0) * 1000 * sum(phase.mixture.values()) / phase.batch_size - 1e-6))


def rate_factor(step: int, steps: int, warmup: float) -> float:
    """Return the factor on the peak learning rate at a step: linear warm-up, then cosine decay to 0.

    `warmup` is the share of the steps that the warm-up takes.
    """
    warmup_steps = max(1, round(steps * warmup))
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))


class CurveWriter:
    """Writes the values of each training step as one line of curve.jsonl and passes them to `log`; only on rank 0.

    When training resumes, lines of curve.jsonl at or after the step of the checkpoint are dropped, and so is an
    incomplete last line of a killed process. Raises ValueError if another line is not valid JSON.
    """

    def __init__(self, folder: Path, log: Log, *, first_step: int) -> None:
        self.path, self.log = folder / "curve.jsonl", log
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        *lines, last = text.removesuffix("\n").split("\n")
        lines += [last] if last.endswith("}") else []
        rows = parse_lines(lines, self.path, f"remove the folder {folder}, then training starts from its first step")
        write_jsonl(self.path, [row for _, row in rows if row["step"] < first_step])

    def write(self, step: int, values: dict[str, float]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step} | {key: round(value, 6) for key, value in values.items()}) + "\n")
        self.log(step, values)


@contextmanager
def explain_out_of_memory(name: str, phase: Phase, runtime: Runtime) -> Iterator[None]:
    """Replace an out-of-memory error by a ValueError that lists the settings of runtime.yaml that use less memory."""
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
                         f"{', or '.join(cures) or 'more gpus'}; 'onediff plan' shows which settings fit") from error


def diverged(run: TrainingRun, step: int, loss: float) -> ValueError:
    """Record that the loss is not finite and return the error to raise.

    The names of all rows in the batch of this step are written to diverged.json. The last checkpoint is kept.
    """
    names = [row.name for row in run.rows(step)]
    write_status(run.folder, "diverged", step, f"loss {loss} at step {step}")
    write_json(run.folder / "diverged.json", {"step": step, "rows": names})
    few = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return ValueError(f"{run.name}: the loss must be finite, but became {loss} at step {step}, on rows "
                      f"{few or 'without names'} (all rows: {run.folder}/diverged.json); check these rows, or lower "
                      "the learning rates in params.yaml")


def preempted(run: TrainingRun, num_done: int, reason: str) -> ValueError:
    """Record that a signal stopped the run after `num_done` steps and return the error to raise."""
    write_status(run.folder, "preempted", num_done, reason)
    return ValueError(f"{run.name}: stopped by {reason}; the checkpoint of step {num_done} is saved; run the same "
                      "command again to continue training")


def validate(engine: Engine, validation: Validation) -> float:
    """Return the validation score of the current weights.

    Each rank captions a part of the validation pairs. All ranks get all captions, and return an equal score.
    """
    engine.model.eval()
    captions = engine.gather_texts(validation.generate_captions, validation.num_pairs)
    engine.model.train()
    return validation.score(captions)


def best_file(folder: Path, step: int) -> Path:
    """Return the path of the best weights. The name contains the step, by which a resumed run finds the file."""
    return folder / "best" / f"step-{step:07d}.safetensors"


def save_best(engine: Engine, path: Path) -> None:
    """Save the trainable parameters to `path`. Only rank 0 writes, but all ranks must call this to gather weights."""
    weights = engine.learned_weights()
    if weights is not None:
        with new_file(path) as part:
            save_file({name: value.contiguous() for name, value in weights.items()}, part)


def remove_superseded(engine: Engine, folder: Path, best_step: int | None) -> None:
    """Remove all best weights except those of `best_step` and those to which a checkpoint refers. Only rank 0 removes.

    If a run resumes from this checkpoint and no later step is better, it needs the weights that were the best then.
    """
    if engine.rank == 0:
        kept = {best_file(folder, step) for step in checkpoint.best_steps(folder) | {best_step} if step is not None}
        for path in {*(folder / "best").glob("*.safetensors")} - kept:
            path.unlink()


def export(engine: Engine, run: TrainingRun, best_step: int | None) -> dict[str, Tensor] | None:
    """Return the weights of the complete model on rank 0, and None on the other ranks.

    Trainable parameters have their values of `best_step`. LoRA adapters are merged into the base weights.
    """
    weights = engine.model_weights()
    if weights is not None and best_step is not None:
        best = load_file(best_file(run.folder, best_step))
        # A weight that two layers share has two names but is saved under one, so values are matched by tensor id.
        best_of = {id(weights[name]): value for name, value in best.items()}
        weights = {name: best_of.get(id(value), value) for name, value in weights.items()}
    return lora.merged(weights, run.phase.lora) if weights is not None and run.phase.lora else weights
