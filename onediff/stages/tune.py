"""Stage `tune` runs the second training phase (instruction tuning), from the aligned model to the final model."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from onediff.config import Config, Runtime
from onediff.data.record import Record, read_records
from onediff.paths import ALIGNED, DIFFCAP
from onediff.stages.command import run
from onediff.stages.training import train

if TYPE_CHECKING:  # The import of torch takes seconds, and `run` must restore the old outputs of the stage before it.
    from onediff.train.loop import TrainingRun, Validation


def tune() -> None:
    """Run training phase 2. It writes data/models/tune, data/curves/tune.jsonl and data/runs/tune.json."""
    train("tune", prepare)


def prepare(config: Config, runtime: Runtime, folder: Path) -> TrainingRun:
    """Prepare training phase 2. Return a TrainingRun, with validation by CIDEr if `validate_every` is set."""
    from onediff.train import phases

    training = phases.tune(config, runtime, data=DIFFCAP, start=ALIGNED, folder=folder)
    every = config.tune.validate_every
    return replace(training, validation=cider_on_val(config, training, every)) if every else training


def cider_on_val(config: Config, training: TrainingRun, every_steps: int) -> Validation:
    """Return a validation that computes CIDEr on about `num_val` pairs of the `val` split, always on the same pairs.

    Each source of the training mixture gives the same number of pairs, if it has enough.
    """
    from onediff.eval.caption import caption_records
    from onediff.eval.metrics.ngrams import corpus_cider
    from onediff.model.captioner import Captioner
    from onediff.train.loop import Validation

    share = -(-config.tune.num_val // len(config.tune.mixture))
    pairs: list[Record] = []
    for source in sorted(config.tune.mixture):
        pairs += islice((record for record in read_records(DIFFCAP, "val-*.parquet") if record.source == source), share)
    references = {pair.pair_id: pair.references for pair in pairs}

    def generate_captions(numbers: list[int]) -> list[str]:
        captioner, chosen = Captioner(training.model, training.processor), [pairs[number] for number in numbers]
        return [caption for _, caption in caption_records(captioner, chosen, config.caption, config.tasks)]

    def score(captions: list[str]) -> float:
        return corpus_cider({pair.pair_id: caption for pair, caption in zip(pairs, captions, strict=True)}, references)

    return Validation(every_steps, len(pairs), generate_captions, score)


if __name__ == "__main__":
    run(tune)
