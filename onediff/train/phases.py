"""The two training phases: what each reads, what learns in it, and how long it lasts; `fit` does the rest."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from onediff.config import Align, Config, Phase, Runtime
from onediff.data.batches.corpus import Corpus
from onediff.data.batches.features import FeatureStore
from onediff.data.batches.loader import (
    Batch,
    Pixels,
    Rows,
    collate,
    coupled_rows,
    decode,
    shared_out,
    single_rows,
    stream,
    tune_entries,
    tune_rows,
)
from onediff.inputs.processing import OneDiffProcessor
from onediff.model.assemble import build
from onediff.model.captioner import pick_device
from onediff.model.digest import weights_digest
from onediff.model.onediff import OneDiffForConditionalGeneration
from onediff.model.weights import load_trained
from onediff.train import checkpoint
from onediff.train.cost import Flops, peak_tflops
from onediff.train.loop import Fitted, Judge, Log, fit
from onediff.train.speed import Meter

JudgeOf = Callable[[OneDiffForConditionalGeneration, OneDiffProcessor], Judge]
FINAL = "final"  # what a finished run leaves in its folder: the model, and summary.json


def run_folder(name: str, config: Config, runtime: Runtime, *, data: Path, start: Path | None = None) -> Path:
    """The run's folder in scratch, keyed by what decides its result.

    A changed parameter, data set or start begins anew, an interrupted run goes on.
    """
    phase: Phase | None = getattr(config, name)
    starts = [str(start)] if start else [config.model.vision.path, config.model.language, config.model.delta.init]
    return checkpoint.scratch_of(runtime.scratch, name, [
        config.seed, config.model.model_dump(), phase.model_dump() if phase else None,
        {key: task.model_dump() for key, task in config.tasks.items()},
        (data / "card.json").read_text(encoding="utf-8"),
        [weights_digest(Path(path)) if Path(path).is_dir() and any(Path(path).glob("*.safetensors")) else path
         for path in starts]])


def align(config: Config, runtime: Runtime, *, data: Path, folder: Path, log: Log) -> None:
    """Phase 1, Coupled Sample Training: single images coupled into pseudo pairs, both captions the target.

    There is nothing to validate on. Without settings of its own the checkpoints go on to `tune` as they are.
    """
    model, processor = build(config.model, seed=config.seed)
    if config.align is None:
        (folder / "curve.jsonl").touch()
        leave(folder, model, processor, Fitted({"steps": 0, "seconds": 0.0}, None))
        return
    phase: Align = config.align
    corpus = Corpus.read(data, "train", phase.mixture, store=folder / "corpus")
    settings = {"seed": config.seed, "batch_size": phase.batch_size}
    rows = (coupled_rows(corpus, phase.mixture, config.model.template, mask_patches=phase.mask_patches, **settings)
            if phase.samples == "coupled" else single_rows(corpus, phase.mixture, config.model.template, **settings))
    _train("align", phase, runtime, model=model, processor=processor, corpus=corpus, rows=rows, folder=folder, log=log,
           num_samples=len(corpus.samples))


def tune(config: Config, runtime: Runtime, *, data: Path, start: Path, folder: Path, judge_of: JudgeOf,
         log: Log) -> None:
    """Phase 2, multi-task instruction tuning over all sources, from the folder that `align` left.

    The best on `val` is kept.
    """
    model, processor = load_trained(start)
    phase = config.tune
    corpus = Corpus.read(data, "train", phase.mixture, store=folder / "corpus")
    entries = tune_entries(corpus, phase.mixture, config.tasks)
    rows = tune_rows(entries, phase.mixture, config.tasks, config.model.template, seed=config.seed,
                     batch_size=phase.batch_size, mask_patches=phase.mask_patches)
    _train("tune", phase, runtime, model=model, processor=processor, corpus=corpus, rows=rows, folder=folder, log=log,
           num_samples=len(entries), judge=judge_of(model, processor) if phase.validate_every else None)


def _train(name: str, phase: Phase, runtime: Runtime, *, model: OneDiffForConditionalGeneration,
           processor: OneDiffProcessor, corpus: Corpus, rows: Rows, folder: Path, log: Log, num_samples: int,
           judge: Judge | None = None) -> None:
    checkpoint.write_status(folder, "running", 0)
    device = pick_device(runtime.device)
    model.to(device)
    if device.type == "cpu":
        model.float()  # bfloat16 is far slower there
    try:
        pixels_of = _pixels_of(model, processor, corpus, phase=phase, runtime=runtime)
        make = partial(micro_batches, rows, processor, pixels_of, runtime=runtime, num_micro=num_micro(phase, runtime))
        steps = steps_of(phase, num_samples)
        fitted = fit(model, phase, runtime, name=name, steps=steps, folder=folder, num_micro=num_micro(phase, runtime),
                     batches=partial(_batches, make, steps=steps, runtime=runtime, device=device), log=log, judge=judge,
                     meter=_meter(model, phase, runtime, cached=isinstance(pixels_of, FeatureStore), device=device),
                     names=lambda step: [row.name for row in rows(step)])
        if fitted.weights is not None:
            leave(folder, model, processor, fitted)
    finally:
        checkpoint.close_status(folder)


def leave(folder: Path, model: OneDiffForConditionalGeneration, processor: OneDiffProcessor, fitted: Fitted) -> None:
    """The trained model where the stage fetches it, whoever trained it; finished only once it is whole."""
    final = folder / FINAL
    model.save_pretrained(final, state_dict=fitted.weights)
    processor.save_pretrained(final)
    (folder / "summary.json").write_text(json.dumps(fitted.summary), encoding="utf-8")
    checkpoint.write_status(folder, "finished", fitted.summary["steps"])


def _pixels_of(model: OneDiffForConditionalGeneration, processor: OneDiffProcessor, corpus: Corpus, *, phase: Phase,
               runtime: Runtime) -> Pixels:
    """A frozen tower sees each image once if its features fit; one that learns sees it at every step."""
    config = model.config
    gb = (len(corpus.source_of) * len(config.read_levels) * config.num_patches * config.vision_config.hidden_size
          * 4 / 1e9)
    if phase.lr_vision or gb > runtime.feature_cache_gb or not corpus.source_of:
        return decode(corpus, processor)
    device = next(model.parameters()).device
    tower_digest = f"{sum(p.double().abs().sum().item() for p in model.vision.parameters())} {config.read_levels}"
    return FeatureStore.prepare(corpus, processor, lambda images: model.eval().vision(images.to(device)),
                                sources=sorted(set(corpus.source_of.values())), tower_digest=tower_digest,
                                scratch=Path(runtime.scratch))


def _meter(model: OneDiffForConditionalGeneration, phase: Phase, runtime: Runtime, *, cached: bool,
           device: torch.device) -> Meter:
    of_one = runtime.peak_tflops or (peak_tflops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None)
    return Meter(Flops.of(model, phase, cached_tower=cached), of_one and of_one * 1e12 * runtime.num_ranks)


def steps_of(phase: Phase, num_samples: int) -> int:
    if phase.steps is not None:
        return phase.steps
    return max(1, math.ceil((phase.epochs or 0) * num_samples / phase.batch_size))


def num_micro(phase: Phase, runtime: Runtime) -> int:
    """Micro-batches per step and rank. Raises ValueError unless they divide the batch."""
    per_rank, left = divmod(phase.batch_size, runtime.num_ranks)
    size = runtime.micro_batch_size or per_rank
    if left or not size or per_rank % size:
        raise ValueError(f"runtime.yaml: batch_size {phase.batch_size} does not split over {runtime.num_ranks} GPUs "
                         f"in micro-batches of {size}; change gpus, nodes or micro_batch_size")
    return per_rank // size


def micro_batches(rows: Rows, processor: OneDiffProcessor, pixels_of: Pixels, step: int, rank: int, *,
                  runtime: Runtime, num_micro: int) -> list[Batch]:
    """This rank's share of the step's rows, in `num_micro` parts."""
    parts = shared_out(rows(step), runtime.num_ranks * num_micro, tokens_per_image=processor.tokens_per_image)
    return [collate(part, processor, pixels_of) for part in parts[rank :: runtime.num_ranks]]


def _batches(make: Callable[[int, int], list[Batch]], first: int, rank: int, world: int, *, steps: int,
             runtime: Runtime, device: torch.device) -> Iterator[list[Batch]]:
    if world != runtime.num_ranks:
        raise ValueError(f"runtime.yaml: nodes x gpus is {runtime.num_ranks}, but {world} processes were started; make "
                         "them agree")
    workers = runtime.loader_workers
    if workers is None:  # on a CPU they would only take its cores from the training
        workers = 0 if device.type == "cpu" else max(1, (len(os.sched_getaffinity(0)) - 1) // runtime.gpus)
    return stream(lambda step: make(step, rank), first, steps, workers=workers, pin=device.type == "cuda")
