"""The Prefect tasks of the flows: run a DVC stage, score a version again, and call the MLflow server."""

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from prefect import State, task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run
from prefect.states import Completed, Failed

from flows.pipeline import metric_files, outcome, reason
from flows.processes import DVC, stream
from onediff import paths, registry
from onediff.config import load_params
from onediff.repro.lock import preserved_dvc_lock, restore_outs, uncached_outs
from onediff.tracking import log_evaluation


def _may_recover(task: Any, run: Any, state: State[Any]) -> bool:
    """Return whether the task failed because a server could not be reached; only then can a retry help."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, (ConnectionError, TimeoutError)) or "cannot be reached" in str(error)


service_task = task(cache_policy=NO_CACHE, retries=2, retry_delay_seconds=10, retry_condition_fn=_may_recover)
propose = service_task(registry.propose)
assess = service_task(registry.assess)
promote = service_task(registry.promote)
rollback = service_task(registry.rollback)


def author() -> str:
    """Return the name and id of this flow run, which the registry records as the author of an alias change."""
    return f"flow run {flow_run.name} ({flow_run.id})"


@task(task_run_name="{stage}", cache_policy=NO_CACHE)
def repro(stage: str) -> State[Any]:
    """Run `dvc repro --single-item STAGE`, and return a Prefect state named Ran, Restored (from a cache) or UpToDate.

    A failed stage is not retried, because the same inputs would fail again.
    """
    start = time.time()
    with preserved_dvc_lock():
        status, stdout = stream([*DVC, "repro", "--single-item", stage])
    if status:
        restore_outs(stage)  # A stage that was killed could not restore its old outputs itself.
        return Failed(message=f"{stage} failed{reason(Path(), start)}")
    lost = [path for path in uncached_outs(stage) if path not in metric_files()]
    if lost:
        return Failed(message=f"{stage}: DVC could not put {lost[0]} into its cache, see DVC's message above; if the "
                              "disk is full, free some space; then run the same command again")
    return Completed(name=outcome(stdout), message=f"{stage}: {outcome(stdout)}, {time.time() - start:.0f} s")


@service_task
def register() -> str:
    """Log scores, report and sample pictures to MLflow, register the trained model, and return its version number.

    The version receives the alias `candidate`. Calling the task again with unchanged scores and an unchanged model
    creates neither a new run nor a new version.
    """
    from onediff.ops import candidate

    evaluation, run = log_evaluation(load_params()), json.loads((paths.RUNS / "tune.json").read_text())
    return candidate.register(paths.TRAINED, run_id=run["run_id"], evaluation_run=evaluation, by=author())


@task(cache_policy=NO_CACHE)
def score_again(model: str) -> registry.Evidence:
    """Caption and score a registered model version; return the digests of the model folder and of the new scores.

    The work is done in .onediff/evaluate, so that the pipeline's own results in data/ do not change.
    """
    if not paths.CARD.exists():
        raise ValueError(f"{paths.DIFFCAP} does not exist in {Path.cwd()}, but scoring {model} again needs it: "
                         f"run 'dvc pull {paths.DIFFCAP}' in that folder, or 'make run'")
    folder = Path(".onediff/evaluate").absolute()
    shutil.rmtree(folder, ignore_errors=True)
    (folder / paths.DATA).mkdir(parents=True)
    (folder / paths.DIFFCAP).symlink_to(paths.DIFFCAP.absolute(), target_is_directory=True)
    for path in (paths.PARAMS, paths.RUNTIME):
        if path.exists():
            shutil.copy(path, folder)
    weights = registry.model_folder(model).absolute()
    for stage, *arguments in (("caption", str(weights)), ("score",)):
        status, _ = stream([sys.executable, "-m", f"onediff.stages.{stage}", *arguments], folder)
        if status:
            raise ValueError(f"{stage} of {model} failed; see its message above")
    return registry.evidence_of(weights, folder)


@service_task
def rescore(version: str, evidence: registry.Evidence) -> None:
    """Write the new scores into the registered version and into an MLflow run."""
    registry.rescore(version, evidence)
    log_evaluation(load_params(), data=evidence.root / paths.DATA)
