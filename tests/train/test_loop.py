from __future__ import annotations

import itertools
import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from parts import RATES, batch_of, small
from parts import phase as any_phase

from onediff.config import Phase, Runtime
from onediff.data.batches.sampling import BatchRow
from onediff.inputs.processing import IGNORED
from onediff.inputs.prompt import text_prompt
from onediff.interrupts import SIGNALS
from onediff.model.onediff import OneDiffForConditionalGeneration
from onediff.train import checkpoint
from onediff.train.loop import CurveWriter, Trained, TrainingRun, Validation, fit, rate_factor
from onediff.train.speed import Meter

STEPS = 9


def phase(**changes: Any) -> Phase:
    return any_phase(**{"steps": STEPS, "batch_size": 6} | changes)


def batch_of_step(model: OneDiffForConditionalGeneration, step: int) -> dict[str, torch.Tensor]:
    """Return a training batch of six rows with labels; the images depend on the step."""
    batch = batch_of(model, [2, 0, 1, 2, 1, 2])
    generator = torch.Generator().manual_seed(step)
    batch["images"] = torch.randn(batch["images"].shape, generator=generator)
    ignored = (batch["input_ids"] > 96) | (batch["attention_mask"] == 0)
    batch["labels"] = batch["input_ids"].masked_fill(ignored, IGNORED)
    return batch


def split(batch: dict[str, torch.Tensor], parts: int) -> list[dict[str, torch.Tensor]]:
    """Split a batch into `parts` micro-batches with equally many rows."""
    size = len(batch["input_ids"]) // parts
    counts = batch["image_counts"]
    micro_batches = []
    for start in range(0, len(counts), size):
        first, last = int(counts[:start].sum()), int(counts[: start + size].sum())
        micro_batches.append({k: v[start : start + size] for k, v in batch.items() if k != "images"}
                             | {"images": batch["images"][first:last]})
    return micro_batches


def train(folder: Path, *, num_micro: int = 1, log: Callable[[int, dict[str, float]], None] = lambda step, values: None,
          score: Callable[[OneDiffForConditionalGeneration], float] | None = None, settings: Phase | None = None,
          every_s: float = 0.0001,
          batch: Callable[[OneDiffForConditionalGeneration, int], dict[str, torch.Tensor]] = batch_of_step,
          ) -> tuple[OneDiffForConditionalGeneration, Trained]:
    """Train a small model with `fit`, and return a model with the best weights and the result of `fit`.

    If `score` is given, it is the validation score and is computed every three steps. `batch` returns the batch of a
    step, which is split into `num_micro` micro-batches. `fit` calls `log` after each step, and writes a checkpoint
    if `every_s` seconds have passed since the last one.
    """
    model = small()
    folder.mkdir(exist_ok=True)
    validation = score and Validation(3, 1, lambda numbers: [str(score(model))], lambda texts: float(texts[0]))
    training = TrainingRun(
        "test", settings or phase(), Runtime(checkpoint_every_s=every_s, micro_batch_size=6 // num_micro), folder,
        model, processor=None, corpus=None, validation=validation,
        rows=lambda step: [BatchRow((), text_prompt("plain", ""), name=f"scenes/{step}-{row}") for row in range(6)])
    trained = fit(training, lambda first, rank: (split(batch(model, step), num_micro)
                                                 for step in itertools.count(first)), log, Meter(lambda _: 0.0, None))
    assert trained.weights is not None
    best = small()
    best.load_state_dict(trained.weights)
    return best, trained


def same_weights(a: torch.nn.Module, b: torch.nn.Module, atol: float = 0.0) -> bool:
    """Check that two models have equal weights, up to the tolerance `atol`.

    With a tolerance, the biases of attention keys are not compared. Their exact gradient is 0, so their computed
    gradient is only a rounding error, which Adam scales up.
    """
    expected = b.state_dict()
    return all(torch.allclose(x, expected[name], atol=atol, rtol=0) for name, x in a.state_dict().items()
               if not (atol and name.endswith("key.bias")))


def train_in_plain_torch() -> tuple[OneDiffForConditionalGeneration, list[float]]:
    """Run the training of `train` without DeepSpeed, in a simple torch loop, and return the model and the losses."""
    model, losses = small().train(), []
    groups = [{"params": [p for n, p in model.named_parameters() if model.part_of(n) == part],
               "lr": 0.0, "peak": RATES[f"lr_{part}"]}
              for part in ("delta", "projector", "language")]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), weight_decay=0.0)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate_factor(step, STEPS, 0.2)
        optimizer.zero_grad()
        loss = model(**batch_of_step(model, step)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], 0.5)
        optimizer.step()
        losses.append(loss.item())
    return model, losses


def test_fit_gives_the_losses_and_weights_of_a_plain_torch_loop(tmp_path: Path) -> None:
    model, losses = train_in_plain_torch()
    fitted, _ = train(tmp_path)
    curve = [json.loads(line) for line in (tmp_path / "curve.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in curve] == pytest.approx(losses, abs=1e-5)
    assert same_weights(model, fitted, atol=1e-5)


@pytest.mark.parametrize("num_micro", [2, 3])
def test_micro_batches_of_different_lengths_train_like_the_complete_batch(num_micro: int, tmp_path: Path) -> None:
    complete, _ = train(tmp_path / "complete")
    split_model, _ = train(tmp_path / "split", num_micro=num_micro)
    assert same_weights(complete, split_model, atol=2e-5)


def test_a_part_with_learning_rate_zero_is_frozen(tmp_path: Path) -> None:
    start = small()
    model, _ = train(tmp_path, settings=phase(lr_language=0.0))
    for name, value in model.named_parameters():
        changed = not torch.equal(value, dict(start.named_parameters())[name])
        is_trainable = model.part_of(name) in ("delta", "projector")
        assert changed == is_trainable or name == "delta.layers.0.self_attention.key.bias", name


@pytest.mark.parametrize("interrupted_at", [1, 4, STEPS - 1])
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_run(interrupted_at: int, tmp_path: Path) -> None:
    score = lambda model: -abs(model.delta.tokens.sum().item())  # noqa: E731
    uninterrupted, expected = train(tmp_path / "a", score=score)

    def interrupt(step: int, values: dict[str, float]) -> None:
        if step == interrupted_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "b", score=score, log=interrupt)
    resumed, actual = train(tmp_path / "b", score=score)
    assert same_weights(uninterrupted, resumed)
    assert all(expected.summary[key] == actual.summary[key] for key in ("best", "best_step"))
    compared = ("step", "loss", "grad_norm", "lr", "val_CIDEr")
    lines = [[{key: value for key, value in json.loads(line).items() if key in compared} for line in
              (tmp_path / run / "curve.jsonl").read_text().splitlines()] for run in "ab"]
    assert lines[0] == lines[1]


@pytest.mark.parametrize("end", ["", '{"step": 3, "lo', '{"step": 3, "loss": 0.5}', '{"step": 3, "loss": 0.5}\n'])
def test_the_curve_continues_at_the_step_of_the_checkpoint_however_the_file_ends(tmp_path: Path, end: str) -> None:
    path, kept = tmp_path / "curve.jsonl", '{"step": 0, "loss": 2.25}\n{"step": 1, "loss": NaN}\n'
    path.write_text(kept + '{"step": 2, "loss": 1.0}\n' + end)
    CurveWriter(tmp_path, lambda step, values: None, first_step=2).write(2, {"loss": 0.25})
    assert path.read_text() == kept + '{"step": 2, "loss": 0.25}\n'


def test_a_curve_with_a_broken_line_is_refused(tmp_path: Path) -> None:
    (tmp_path / "curve.jsonl").write_text('{"step": 0\n{"step": 1, "loss": 1.0}\n')
    with pytest.raises(ValueError, match=r"curve\.jsonl line 1: not valid JSON .*remove the folder"):
        CurveWriter(tmp_path, lambda step, values: None, first_step=2)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_stops_the_run_after_writing_a_checkpoint(number: signal.Signals, tmp_path: Path) -> None:
    def stop(step: int, values: dict[str, float]) -> None:
        if step == 3:
            os.kill(os.getpid(), number)

    with pytest.raises(ValueError, match=f"stopped by {number.name}; the checkpoint of step 4 is saved; run the same"):
        train(tmp_path, log=stop, every_s=1e9)
    status = json.loads((tmp_path / "status.json").read_text())
    assert status == {"state": "preempted", "step": 4, "reason": number.name}
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["step-0000004"]


def test_the_result_has_the_weights_of_the_step_with_the_best_validation_score(tmp_path: Path) -> None:
    scores = iter([1.0, 3.0, 2.0])
    weights: list[dict[str, torch.Tensor]] = []

    def score(model: OneDiffForConditionalGeneration) -> float:
        weights.append({k: v.clone() for k, v in model.state_dict().items()})
        return next(scores)

    model, fitted = train(tmp_path, score=score)
    assert (fitted.summary["best"], fitted.summary["best_step"]) == (3.0, 6)
    assert all(torch.equal(value, weights[1][name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("every_s", "most"), [(1e9, 1), (0.0001, 1 + checkpoint.KEEP)])
def test_only_the_best_weights_and_those_of_a_checkpoint_are_kept(every_s: float, most: int, tmp_path: Path) -> None:
    scores = map(float, itertools.count())  # Every step is better than all earlier steps.
    num_files: list[int] = []
    train(tmp_path, score=lambda model: next(scores), settings=phase(steps=18), every_s=every_s,
          log=lambda step, values: num_files.append(len([*tmp_path.glob("best/*")])))
    assert max(num_files) <= most and len([*tmp_path.glob("best/*")]) <= most
    assert (tmp_path / "best/step-0000018.safetensors").exists()
    assert {f"step-{step:07d}.safetensors" for step in checkpoint.best_steps(tmp_path)} <= {
        path.name for path in tmp_path.glob("best/*")}


def test_a_loss_that_is_not_finite_stops_the_run_before_the_update_and_lists_the_rows(tmp_path: Path) -> None:
    def with_infinite_pixels(model: OneDiffForConditionalGeneration, step: int) -> dict[str, torch.Tensor]:
        batch = batch_of_step(model, step)
        if step == 2:
            batch["images"][0] = math.inf
        return batch

    message = (r"the loss must be finite, but became nan at step 2, on rows scenes/2-0, scenes/2-1, scenes/2-2 and 3 "
               r"more \(all rows: .*diverged.json\); check these rows, or lower the learning rates")
    with pytest.raises(ValueError, match=message):
        train(tmp_path, batch=with_infinite_pixels)
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "diverged"
    assert len(json.loads((tmp_path / "diverged.json").read_text())["rows"]) == 6
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["step-0000001", "step-0000002"]


def test_an_incomplete_checkpoint_is_never_loaded(tmp_path: Path) -> None:
    uninterrupted, _ = train(tmp_path / "a")

    def interrupt(step: int, values: dict[str, float]) -> None:
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "b", log=interrupt)
    newest = checkpoint.complete(tmp_path / "b")[-1]
    (newest / "complete.json").unlink()
    for file in newest.iterdir():
        file.write_bytes(file.read_bytes()[:100])
    assert same_weights(uninterrupted, train(tmp_path / "b")[0])


def test_a_full_disk_stops_the_run_and_keeps_the_previous_checkpoint(tmp_path: Path) -> None:
    """Use a limit on the file size (RLIMIT_FSIZE) instead of a full disk, because it needs no root privileges."""
    import resource

    def limit_file_size(step: int, values: dict[str, float]) -> None:
        if step == 4:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    uninterrupted, _ = train(tmp_path / "a")
    try:
        message = r"the checkpoint could not be written .*; free some disk space and run the same command again"
        with pytest.raises(OSError, match=message) as caught:
            train(tmp_path / "b", log=limit_file_size)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.__cause__ is not None
    assert checkpoint.complete(tmp_path / "b")
    assert same_weights(uninterrupted, train(tmp_path / "b")[0])


def test_an_old_checkpoint_is_deleted_only_after_a_newer_checkpoint_is_complete(tmp_path: Path) -> None:
    num_complete: list[int] = []
    train(tmp_path, log=lambda step, values: num_complete.append(len(checkpoint.complete(tmp_path))))
    assert num_complete[:2] == [0, 1]
    assert set(num_complete[3:]) == {checkpoint.KEEP}


def test_the_learning_rate_rises_linearly_and_then_falls_to_zero() -> None:
    factors = [rate_factor(step, 100, 0.1) for step in range(100)]
    assert factors[:10] == pytest.approx([0.1 * (k + 1) for k in range(10)])
    assert factors[10] == 1.0
    assert all(a > b for a, b in itertools.pairwise(factors[10:]))
    assert factors[-1] < 0.001
