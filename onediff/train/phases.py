"""The two training phases, `align` and `tune`: each prepares the model and the data, then `loop.fit` trains."""

import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from onediff.config import Config, Phase, Runtime
from onediff.data.batches.corpus import Corpus
from onediff.data.batches.loader import Batch, FeatureStore, Pixels, collate, decode, shared_out, stream
from onediff.data.batches.sampling import Sampling, coupled_rows, single_rows, tune_entries, tune_rows
from onediff.data.batches.targets import targets_of
from onediff.files import key_of
from onediff.inputs.attributes import CLASSES
from onediff.inputs.processing import OneDiffProcessor
from onediff.model.assemble import build
from onediff.model.captioner import pick_device
from onediff.model.configuration import OneDiffConfig
from onediff.model.digest import weights_digest
from onediff.model.onediff import OneDiffForConditionalGeneration
from onediff.model.packing import DESCRIPTIONS, packed_logits
from onediff.model.weights import load_trained
from onediff.paths import ALIGNED, CARD
from onediff.train.cost import Flops, peak_tflops
from onediff.train.engine import auxiliary_weights, num_micro
from onediff.train.loop import Log, Trained, TrainingRun, fit
from onediff.train.speed import Meter
from onediff.train.status import FINAL, recorded_errors, write_status


def run_folder(name: str, config: Config, runtime: Runtime) -> Path:
    """Create the folder of a run in scratch. The name contains a hash of everything that decides the result.

    An interrupted run therefore continues in the existing folder, and a run with a changed parameter, data set or
    initial model gets a new folder.
    """
    phase: Phase | None = getattr(config, name)
    starts = ([str(ALIGNED)] if name == "tune"
              else [config.model.vision.path, config.model.language, config.model.delta.init])
    key = key_of([
        config.seed, config.model.model_dump(), CLASSES, phase.model_dump() if phase else None,
        {source: task.model_dump() for source, task in config.tasks.items()}, CARD.read_text(encoding="utf-8"),
        [weights_digest(Path(path)) if Path(path).is_dir() and any(Path(path).glob("*.safetensors")) else path
         for path in starts]])
    folder = Path(runtime.scratch).absolute() / f"{name}-{key[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def align(config: Config, runtime: Runtime, *, data: Path, folder: Path) -> TrainingRun | None:
    """Prepare phase 1, Coupled Sample Training: two unrelated images form a pair, and both captions are the target.

    If params.yaml has no `align` section, this function saves the untrained model for `tune` and returns None.
    """
    model, processor = build(config.model, seed=config.seed)
    phase = config.align
    if phase is None:
        (folder / "curve.jsonl").touch()
        save_final_model(folder, model, processor, Trained({"steps": 0, "seconds": 0.0}, None))
        return None
    corpus = Corpus.read(data, "train", phase.mixture, store=folder / "corpus")
    rows_of = coupled_rows if phase.samples == "coupled" else single_rows
    return TrainingRun("align", phase, runtime, folder, model, processor, corpus,
                       rows_of(corpus, Sampling.of(config, phase)))


def tune(config: Config, runtime: Runtime, *, data: Path, start: Path, folder: Path) -> TrainingRun:
    """Prepare phase 2, multi-task instruction tuning on all sources, starting from the model that `align` saved."""
    model, processor = load_trained(start)
    phase = config.tune
    corpus = Corpus.read(data, "train", phase.mixture, store=folder / "corpus")
    sampling = Sampling.of(config, phase)
    return TrainingRun("tune", phase, runtime, folder, model, processor, corpus,
                       tune_rows(tune_entries(corpus, sampling), sampling))


def train(run: TrainingRun, log: Log) -> None:
    """Train the model of a run and save it in the folder of the run. status.json then has the state `finished`."""
    write_status(run.folder, "running", 0)
    runtime, device = run.runtime, pick_device(run.runtime.device)
    run.model.to(device)
    if run.model.row_logits is not packed_logits and os.environ.get("RANK", "0") == "0":
        print(f"{run.name}: rows are {DESCRIPTIONS[run.model.row_logits]}, because packed rows are not known to be "
              f"exact for this language model ({run.model.config.text_config.model_type})")
    workers, peak = runtime.loader_workers, runtime.peak_tflops
    if device.type == "cpu":
        run.model.float()  # On a CPU, bfloat16 is much slower than float32.
        workers = workers or 0  # On a CPU, loader processes would take cores away from training.
    else:
        workers = max(1, (len(os.sched_getaffinity(0)) - 1) // runtime.gpus) if workers is None else workers
        peak = peak or peak_tflops(torch.cuda.get_device_name(device))

    with recorded_errors(run.folder):
        pixels_of, config = _pixels_of(run), run.model.config
        targets = (partial(targets_of, classes=config.delta_classes, places=config.delta_fusion["places"])
                   if auxiliary_weights(run.phase) and config.delta_fusion else None)

        def micro_batches(step: int, rank: int) -> list[Batch]:
            parts = shared_out(run.rows(step), runtime.num_ranks * num_micro(run.phase, runtime),
                               tokens_per_image=run.processor.tokens_per_image)
            return [collate(part, run.processor, pixels_of, targets) for part in parts[rank :: runtime.num_ranks]]

        def batches(first: int, rank: int) -> Iterator[list[Batch]]:
            return stream(lambda step: micro_batches(step, rank), range(first, run.num_steps), workers=workers,
                          pin=device.type == "cuda")

        flops_of = Flops.of(run.model, run.phase, cached_tower=isinstance(pixels_of, FeatureStore))
        trained = fit(run, batches, log, Meter(flops_of, peak and peak * 1e12 * runtime.num_ranks))
        if trained.weights is not None:
            save_final_model(run.folder, run.model, run.processor, trained)


def save_final_model(folder: Path, model: OneDiffForConditionalGeneration, processor: OneDiffProcessor,
                     trained: Trained) -> None:
    """Write the trained model, the processor and the summary to the run's folder, where the DVC stage reads them."""
    model.save_pretrained(folder / FINAL, state_dict=trained.weights)
    processor.save_pretrained(folder / FINAL)
    (folder / "summary.json").write_text(json.dumps(trained.summary), encoding="utf-8")
    write_status(folder, "finished", trained.summary["steps"])


def _pixels_of(run: TrainingRun) -> Pixels:
    """Return a function that loads the images of a batch, either as pixels or as features of the frozen vision tower.

    Features are computed once, before training, if the tower is frozen and they fit into `feature_cache_gb`.
    """
    model, num_images = run.model, len(run.corpus.source_of)
    gb = feature_gb(model.config, num_images)
    if run.phase.lr_vision or gb > run.runtime.feature_cache_gb or not num_images:
        return decode(run.corpus, run.processor)
    device = next(model.parameters()).device
    tower_digest = f"{sum(p.double().abs().sum().item() for p in model.vision.parameters())} {model.config.read_levels}"
    return FeatureStore.prepare(run.corpus, run.processor, lambda images: model.eval().vision(images.to(device)),
                                tower_digest=tower_digest, scratch=Path(run.runtime.scratch),
                                with_pixels=model.fusion is not None)


def feature_gb(config: OneDiffConfig, num_images: float) -> float:
    """Return the size on disk, in GB, of the vision tower's features of `num_images` images.

    A model with Fusion also needs their pixels.
    """
    pixels = 3 * config.vision_config.image_size**2 if config.delta_fusion else 0
    return num_images * (len(config.read_levels) * config.num_patches * config.vision_config.hidden_size * 4
                         + pixels) / 1e9
