"""One file per DVC stage: the only place with both I/O and logic."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onediff.config import Config
    from onediff.tracking import Run
    from onediff.train.phases import Trained


def run(stage: Callable[..., object]) -> None:
    """Calls the stage with the command line's arguments; an error of the world becomes one line and exit code 1.

    Under DVC it ends when DVC does: one that was killed must not leave a stage writing where the next one writes.
    """
    if "DVC_STAGE" in os.environ:
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    try:
        stage(*sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"{stage.__name__}: {error}")


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)  # training writes a checkpoint first


def quiet() -> None:
    """Libraries tell errors, not their life."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if os.path.exists("/dev/nvidia0") else "cpu")
    warnings.filterwarnings("ignore", module="torch|transformers|deepspeed")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


@contextmanager
def noted_run(phase: str, config: Config) -> Iterator[Run | None]:
    """MLflow's run of a phase, on global rank 0 alone; the other ranks have none."""
    if os.environ.get("RANK", "0") != "0":
        yield None
        return
    from onediff import tracking

    with tracking.phase_run(phase, config) as run:
        yield run


def silent(step: int, values: dict[str, float]) -> None:
    """Where nobody listens."""


def finish_phase(phase: str, trained: Trained, noted: Run | None) -> None:
    """Rank 0 writes model, curve and run; then the checkpoints may go."""
    from onediff.registry import weights_digest

    if noted is None:
        return
    folder = Path("data/models") / phase
    trained.model.save_pretrained(folder)
    trained.processor.save_pretrained(folder)
    for part in ("curves", "runs"):
        (Path("data") / part).mkdir(parents=True, exist_ok=True)
    shutil.copyfile(trained.folder / "curve.jsonl", Path("data/curves") / f"{phase}.jsonl")
    described = noted.describe(digest=weights_digest(folder)) | trained.summary
    (Path("data/runs") / f"{phase}.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(trained.folder)
