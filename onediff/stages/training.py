"""The common part of the stages `align` and `tune`: run one training phase and store the model in data/models."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from onediff.config import Config, Runtime, load_params, load_runtime
from onediff.files import disk_full_named, link_or_copy, new_file, new_folder, refusing_lock, write_json
from onediff.library_logs import silence_libraries
from onediff.model.digest import weights_digest
from onediff.paths import CURVES, DVC_LOCK, MODELS, RUNS
from onediff.repro.lock import md5_of, outs_of, read_dvc_lock, uncached_outs
from onediff.train.status import FINAL, is_finished

if TYPE_CHECKING:
    from onediff.train.loop import TrainingRun

Prepare = Callable[[Config, Runtime, Path], "TrainingRun | None"]


def train(phase: str, prepare: Prepare) -> None:
    """Run one training phase as runtime.yaml says, and write data/models/PHASE and the files about the training.

    Training writes into the run folder in scratch. The process that DVC started then copies the results from there; a
    rank that a launcher started only trains. `prepare` gets (config, runtime, run folder) and returns the training
    run, or None if the run folder already contains the finished model.
    """
    from onediff import tracking

    config, runtime = load_params(), load_runtime()
    tracking.check()  # Training must not start if MLflow cannot record the run.
    silence_libraries()
    from onediff.train.launch import dispatch
    from onediff.train.phases import run_folder

    is_rank = "LOCAL_RANK" in os.environ
    if not is_rank and not runtime.node_rank:
        remove_committed(phase, Path(runtime.scratch))
    folder = run_folder(phase, config, runtime)
    if is_rank:
        run_locally(phase, prepare, config, runtime, folder)
        return
    if runtime.node_rank and dispatch.launch_ranks(phase, runtime, folder):
        return  # Only node 0 copies the trained model from the run folder to data/models.
    refusal = (f"{folder}: only one run may train in this folder, as two would overwrite each other's checkpoints; "
               "wait for process {holder}, or stop it")
    with refusing_lock(folder / "lock", refusal):
        if not is_finished(folder) and not dispatch.launch_ranks(phase, runtime, folder):
            run_locally(phase, prepare, config, runtime, folder)
        fetch(phase, folder)


def run_locally(phase: str, prepare: Prepare, config: Config, runtime: Runtime, folder: Path) -> None:
    """Train in this process, which is one of the ranks. Only rank 0 records the training in MLflow and run.json."""
    from onediff import tracking
    from onediff.train import phases

    is_rank_0 = os.environ.get("RANK", "0") == "0"
    with (disk_full_named(folder),
          tracking.phase_run(phase, config) if is_rank_0 else nullcontext() as mlflow_run):
        training = prepare(config, runtime, folder)
        if training:
            phases.train(training, mlflow_run.log if mlflow_run else lambda step, values: None)
        if mlflow_run:
            described = mlflow_run.describe(digest=weights_digest(folder / FINAL))
            summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
            write_json(folder / "run.json", described | summary, indent=1)


def fetch(phase: str, folder: Path) -> None:
    """Copy model, curve.jsonl and run.json from the run folder to the outputs of the stage, then remove checkpoints.

    The model is copied first, because it needs most disk space. If DVC runs the stage, the model also stays in the run
    folder until `remove_committed` removes it, so that it is not lost if DVC fails while it commits the outputs.
    """
    with new_folder(MODELS / phase) as part:
        shutil.copytree(folder / FINAL, part, copy_function=link_or_copy, dirs_exist_ok=True)
    for name, out in (("curve.jsonl", CURVES / f"{phase}.jsonl"), ("run.json", RUNS / f"{phase}.json")):
        with new_file(out) as part:
            shutil.copyfile(folder / name, part)
    if "DVC_STAGE" not in os.environ:
        shutil.rmtree(folder)
        return
    for path in folder.iterdir():
        if path.is_dir() and path.name != FINAL:
            shutil.rmtree(path)


def remove_committed(phase: str, scratch: Path) -> None:
    """Remove each run folder that `fetch` kept in scratch, if dvc.lock and the DVC cache contain the run's outputs."""
    # If the disk was full during the commit, dvc.lock lists outputs that are not in the DVC cache.
    if not DVC_LOCK.exists() or uncached_outs(phase):
        return
    committed = outs_of(read_dvc_lock()).get(str(RUNS / f"{phase}.json"))
    for folder in scratch.glob(f"{phase}-*"):
        if is_finished(folder) and md5_of(folder / "run.json") == committed:
            shutil.rmtree(folder)
