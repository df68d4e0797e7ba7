"""The two training phases: what each reads, what learns in it, and how long it lasts; `fit` does the rest."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onediff.config import Config, Phase, Runtime
from onediff.data.loader import Corpus, FeatureStore, Row, collate, coupled_rows, decode, tune_rows
from onediff.inputs.processing import OneDiffProcessor
from onediff.model.build import build
from onediff.model.captioner import pick_device
from onediff.model.onediff import OneDiffForConditionalGeneration
from onediff.train import checkpoint
from onediff.train.loop import Log, fit

Validator = Callable[[OneDiffForConditionalGeneration, OneDiffProcessor], Callable[[], float]]


@dataclass(frozen=True)
class Trained:
    model: OneDiffForConditionalGeneration
    processor: OneDiffProcessor
    summary: dict[str, Any]
    folder: Path


def align(config: Config, runtime: Runtime, *, data: Path, log: Log) -> Trained:
    """Phase 1, Coupled Sample Training: single images coupled into pseudo pairs, both captions the target.

    There is nothing to validate on.
    """
    model, processor = build(config.model, seed=config.seed)
    corpus = Corpus.read(data, "train", config.align.mixture)
    rows = coupled_rows(corpus, config.align.mixture, config.model.template, seed=config.seed,
                        batch_size=config.align.batch_size, mask_patches=config.align.mask_patches)
    return _train("align", config, runtime, config.align, model=model, processor=processor, corpus=corpus, rows=rows,
                  data=data, log=log)


def tune(config: Config, runtime: Runtime, *, data: Path, start: Path, validator: Validator, log: Log) -> Trained:
    """Phase 2, multi-task instruction tuning over all sources, from the folder that `align` left.

    The best on `val` is kept.
    """
    model = OneDiffForConditionalGeneration.from_pretrained(start)
    processor = OneDiffProcessor.from_pretrained(start)
    corpus = Corpus.read(data, "train", config.tune.mixture)
    rows = tune_rows(corpus, config.tune.mixture, config.model.template, seed=config.seed,
                     batch_size=config.tune.batch_size, mask_patches=config.tune.mask_patches)
    return _train("tune", config, runtime, config.tune, model=model, processor=processor, corpus=corpus, rows=rows,
                  data=data, log=log, validator=validator)


def _train(name: str, config: Config, runtime: Runtime, phase: Phase, *, model: OneDiffForConditionalGeneration,
           processor: OneDiffProcessor, corpus: Corpus, rows: Callable[[int], list[Row]], data: Path, log: Log,
           validator: Validator | None = None) -> Trained:
    # Keyed by what decides the result: a changed parameter, data set or start begins anew, an interrupted run goes on.
    folder = checkpoint.scratch_of(runtime.scratch, name, [
        config.seed, config.model.model_dump(), phase.model_dump(),
        (data / "card.json").read_text(encoding="utf-8"), _fingerprint(model)])
    checkpoint.write_status(folder, "running", 0)
    model.to(pick_device(runtime.device))
    try:
        pixels_of = _pixels_of(model, processor, corpus, phase=phase, runtime=runtime)
        validate = validator(model, processor) if validator and phase.validate_every else None
        summary = fit(model, phase, runtime, name=name, steps=steps_of(phase, len(corpus.samples)), folder=folder,
                      micro_batches=partial(_micro_batches, rows, processor, pixels_of,
                                            num_micro=num_micro(phase, runtime)),
                      num_micro=num_micro(phase, runtime), log=log, validate=validate)
    finally:
        checkpoint.close_status(folder)
    checkpoint.write_status(folder, "finished", summary["steps"])
    return Trained(model, processor, summary, folder)


def _fingerprint(model: torch.nn.Module) -> float:
    """Differs when the weights that training starts from differ."""
    return float(sum(p.double().abs().sum() for p in model.parameters()))


def _pixels_of(model: OneDiffForConditionalGeneration, processor: OneDiffProcessor, corpus: Corpus, *, phase: Phase,
               runtime: Runtime) -> Callable[[list[str]], dict[str, Tensor]]:
    """A frozen tower sees each image once; one that learns sees it at every step."""
    if phase.lr_vision:
        return decode(corpus, processor)
    device = next(model.parameters()).device
    tower_digest = str(_fingerprint(model.vision)) + str(model.config.read_levels)
    return FeatureStore.prepare(corpus, processor, lambda images: model.eval().vision(images.to(device)),
                                sources=sorted(set(corpus.source_of.values())), tower_digest=tower_digest,
                                scratch=Path(runtime.scratch))


def steps_of(phase: Phase, num_samples: int) -> int:
    if phase.steps is not None:
        return phase.steps
    return max(1, math.ceil((phase.epochs or 0) * num_samples / phase.batch_size))


def num_micro(phase: Phase, runtime: Runtime) -> int:
    """Micro-batches per step and rank. Raises ValueError unless they divide the batch."""
    per_rank, left = divmod(phase.batch_size, runtime.gpus)
    size = runtime.micro_batch_size or per_rank
    if left or per_rank % size:
        raise ValueError(f"runtime.yaml: batch_size {phase.batch_size} does not split over {runtime.gpus} GPUs "
                         f"in micro-batches of {size}; change gpus or micro_batch_size")
    return per_rank // size


def _micro_batches(rows: Callable[[int], list[Row]], processor: OneDiffProcessor,
                   pixels_of: Callable[[list[str]], dict[str, Tensor]], step: int, rank: int, world: int, *,
                   num_micro: int) -> list[dict[str, Tensor]]:
    """This rank's share of the step's rows, every world-th, in `num_micro` parts."""
    mine = rows(step)[rank::world]
    size = len(mine) // num_micro
    return [collate(mine[start : start + size], processor, pixels_of) for start in range(0, len(mine), size)]
