"""What the stages `align` and `tune` share: one training phase, from DiffCap to a folder under data/models."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from onediff.files import disk_full_named, link_or_copy, new_file, new_folder, write_json
from onediff.library_logs import silence_libraries
from onediff.model.digest import weights_digest
from onediff.paths import DIFFCAP
from onediff.repro.lock import LOCK, md5_of, outs_of, read_dvc_lock, uncached_outs

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
    """No-op logger for ranks without an MLflow run."""


def train(phase: str, *, start: Path | None, work: Callable[[Config, Runtime, Path, Log], None]) -> None:
    """One training phase, wherever runtime.yaml sends it, from DiffCap to data/models/<phase>.

    work(config, runtime, folder, log) trains here, and leaves the model in `folder`, the run's own in scratch. As one
    of the ranks that a launcher started, that is all; the process that DVC started fetches it from there.
    """
    from onediff import tracking
    from onediff.config import load_params, load_runtime

    config, runtime = load_params(), load_runtime()
    tracking.check()  # before any work: what is trained must have somewhere to be noted
    silence_libraries()
    from onediff.train import checkpoint, phases
    from onediff.train.launch import dispatch as launcher
    from onediff.train.launch.status import is_finished

    def here() -> None:
        with disk_full_named(folder), noted_run(phase, config) as noted:
            work(config, runtime, folder, noted.log if noted else silent)
            if noted:
                described = noted.describe(digest=weights_digest(folder / phases.FINAL))
                summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
                write_json(folder / "run.json", described | summary, indent=1)

    if "LOCAL_RANK" not in os.environ and not runtime.node_rank:
        remove_committed(phase, Path(runtime.scratch))
    folder = phases.run_folder(phase, config, runtime, data=DIFFCAP, start=start)
    if "LOCAL_RANK" in os.environ:
        here()
        return
    if runtime.node_rank and launcher.hand_over(phase, runtime, folder):
        return  # node 0 holds the folder, and fetches
    with checkpoint.alone(folder):
        if not is_finished(folder) and not launcher.hand_over(phase, runtime, folder):
            here()
        fetch(phase, folder)


def fetch(phase: str, folder: Path) -> None:
    """Model, curve and run from scratch to where DVC expects them; the model comes first, because it needs most room.

    Then the checkpoints are removed. What was trained stays in scratch until dvc.lock names it: a commit of DVC that
    fails or is interrupted then costs no training.
    """
    with new_folder(Path("data/models") / phase) as part:
        shutil.copytree(folder / "final", part, copy_function=link_or_copy, dirs_exist_ok=True)
    for name, out in (("curve.jsonl", f"data/curves/{phase}.jsonl"), ("run.json", f"data/runs/{phase}.json")):
        with new_file(Path(out)) as part:
            shutil.copyfile(folder / name, part)
    if "DVC_STAGE" not in os.environ:
        shutil.rmtree(folder)
        return
    for path in folder.iterdir():
        if path.is_dir() and path.name != "final":
            shutil.rmtree(path)


def remove_committed(phase: str, scratch: Path) -> None:
    """Removes what `fetch` kept of the run that dvc.lock names: DVC's cache has it now."""
    from onediff.train.launch.status import is_finished

    if not LOCK.exists() or uncached_outs(phase):  # after a commit on a full disk dvc.lock names what no cache has
        return
    committed = outs_of(read_dvc_lock()).get(f"data/runs/{phase}.json")
    for folder in scratch.glob(f"{phase}-*"):
        if is_finished(folder) and md5_of(folder / "run.json") == committed:
            shutil.rmtree(folder)
