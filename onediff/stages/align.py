"""Stage `align` runs the first training phase (Coupled Sample Training) on DiffCap and writes a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from onediff.config import Config, Runtime
from onediff.paths import DIFFCAP
from onediff.stages.command import run
from onediff.stages.training import train

if TYPE_CHECKING:
    from onediff.train.loop import TrainingRun


def align() -> None:
    """Run training phase 1. It writes data/models/align, data/curves/align.jsonl and data/runs/align.json."""
    train("align", prepare)


def prepare(config: Config, runtime: Runtime, folder: Path) -> TrainingRun | None:
    """Prepare training phase 1. Return a TrainingRun, or None if `folder` already contains the finished model."""
    from onediff.train import phases

    return phases.align(config, runtime, data=DIFFCAP, folder=folder)


if __name__ == "__main__":
    run(align)
