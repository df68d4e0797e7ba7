"""What the stages `align` and `tune` share: one training phase, from DiffCap to a folder under data/models."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from onediff.model.digest import weights_digest
from onediff.paths import DIFFCAP
from onediff.stages.command import quiet

if TYPE_CHECKING:
    from onediff.config import Config, Runtime
    from onediff.tracking import Run
    from onediff.train.loop import Log


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
