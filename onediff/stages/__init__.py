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
from typing import TYPE_CHECKING, Any

from onediff.model.digest import weights_digest

if TYPE_CHECKING:
    from onediff.config import Config, Runtime
    from onediff.tracking import Run
    from onediff.train.loop import Log

DIFFCAP = Path("data/diffcap")
FLOW = "ONEDIFF_STARTED_BY"  # the process of the flow, if one started DVC


def rounded(value: Any) -> Any:
    """Figures as metrics files keep them: six places, so that sums in another order are the same bytes."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return round(value, 6) if isinstance(value, float) else value


def run(stage: Callable[..., object]) -> None:
    """Calls the stage with the command line's arguments; an error of the world becomes one line and exit code 1.

    Under DVC it ends when DVC does, or the flow that started it: neither, when killed, may leave a stage writing where
    the next one writes.
    """
    if "DVC_STAGE" in os.environ:
        above = [os.getppid(), *filter(None, [int(os.environ.get(FLOW, 0))])]
        threading.Thread(target=_end_with, args=(above,), daemon=True).start()
    try:
        stage(*sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"{stage.__name__}: {error}")


def _end_with(above: list[int]) -> None:
    import psutil

    try:
        watched = [psutil.Process(pid) for pid in above]
        while all(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in watched):
            time.sleep(0.5)
    except psutil.NoSuchProcess:
        pass
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


def train(phase: str, *, start: Path | None, work: Callable[[Config, Runtime, Path, Log], None]) -> None:
    """One training phase, wherever runtime.yaml sends it, from DiffCap to data/models/<phase>.

    work(config, runtime, folder, log) trains here, and leaves the model in `folder`, the run's own in scratch. As one
    of the ranks that a launcher started, that is all; the process that DVC started fetches it from there.
    """
    from onediff import tracking
    from onediff.config import load_params, load_runtime
    from onediff.energy import counter

    config, runtime = load_params(), load_runtime()
    tracking.check()  # before any work: what is trained must have somewhere to be noted
    quiet()
    from onediff.train import checkpoint, launcher, phases

    def here() -> None:
        with noted_run(phase, config) as noted:
            used_wh = counter() if noted else None
            work(config, runtime, folder, noted.log if noted else silent)
            if noted:
                described = noted.describe(digest=weights_digest(folder / phases.FINAL))
                summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
                # Other nodes' counters cannot be read here.
                energy = {"energy_wh": round(used_wh(), 2) if used_wh else None} if runtime.nodes == 1 else {}
                checkpoint.write_json(folder / "run.json", described | summary | energy)

    folder = phases.run_folder(phase, config, runtime, data=DIFFCAP, start=start)
    if "LOCAL_RANK" in os.environ:
        here()
        return
    if runtime.node_rank and launcher.hand_over(phase, runtime, folder):
        return  # node 0 holds the folder, and fetches
    with checkpoint.alone(folder):
        if not launcher.hand_over(phase, runtime, folder):
            here()
        fetch(phase, folder)


def fetch(phase: str, folder: Path) -> None:
    """Model, curve and run from scratch to where DVC wants them; then the checkpoints may go."""
    model = Path("data/models") / phase
    shutil.rmtree(model, ignore_errors=True)
    for part in ("models", "curves", "runs"):
        (Path("data") / part).mkdir(parents=True, exist_ok=True)
    shutil.copytree(folder / "final", model)
    shutil.copyfile(folder / "curve.jsonl", Path("data/curves") / f"{phase}.jsonl")
    told = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    (Path("data/runs") / f"{phase}.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(folder)
