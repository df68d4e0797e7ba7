"""`python -m flows.retrain`: the stages of dvc.yaml in order, then registering and promotion."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import flow, get_client
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId
from prefect.client.schemas.objects import State
from prefect.client.schemas.sorting import FlowRunSort
from prefect.runtime import deployment, flow_run
from prefect.states import Completed, Failed

from flows import command, pools
from flows.branch import WITHOUT_GIT, commit_results
from flows.notify import tell
from flows.pipeline import dvc, raw_files, stages, stale_elsewhere, stale_stages
from flows.processes import alone
from flows.submit import promote
from flows.tasks import keep_scores, publish_scores, register, repro
from onediff.config import load_params, load_runtime
from onediff.files import disk_full_named
from onediff.git import head
from onediff.repro.preflight import check_inputs

if TYPE_CHECKING:
    from onediff.tracking import Run

AGAIN = "prefect deployment run retrain/retrain"
READ = ("data/diffcap", "data/quarantine.parquet", "data/reports/validation", "data/reports/diffcap",  # to register
        "data/models/tune", "data/runs/align.json", "data/runs/tune.json", "data/captions", "data/scored",
        "data/report.html")
MOST_CRASHES = 3


@flow(name="retrain")
def retrain() -> State[Any]:
    """Runs what is out of date, here or on the workers of runtime.yaml's pools; a stage that fails ends the flow with
    its message. Then the model is registered, and promoted if mlflow/promotion.yaml lets it.
    """
    try:
        _check_crashes()
        with alone(), disk_full_named(Path(".onediff")):
            state = _retrain()
    except (ValueError, OSError) as error:  # told in one line; Prefect would print the whole stack
        state = Failed(message=str(error))
    if state.is_failed():
        tell("failure", "a retraining failed", why=str(state.message), then=AGAIN)
    return state


def _retrain() -> State[Any]:
    work = _on_workers if load_runtime().pools else here
    if work is here:
        check_inputs(load_params())  # before any stage: workers have inputs of their own
    stale = stale_elsewhere() if load_runtime().pools else stale_stages()
    with _parent_run() if stale else nullcontext() as run:
        state = work(stale)
        if not state.is_completed():
            if run:
                run.fail(str(state.message))
            return state
        if state.name == "Ran":
            commit_results(str(flow_run.id).partition("-")[0], remote=load_runtime().git_remote)
            if head() is None:
                print(f"onediff: {WITHOUT_GIT}")
        print(publish_scores(Path("data/metrics.json"), "scores"))
        evaluation = keep_scores()
        version = register(evaluation, by=f"flow run {flow_run.name} ({flow_run.id})")
    said = promote(candidate=version)  # as the candidate: promoting it by its number would undo a rollback
    return Completed(name=state.name, message=said)


def here(stale: set[str]) -> State[Any]:
    """Every stage in this folder; what stands before the first stale one is known to be up to date."""
    ran = False
    for stage in stages(load_params().data):
        state = repro(stage, ask=ran or stage in stale, return_state=True)
        if not state.is_completed():
            return Failed(message=state.message)
        ran = ran or state.name != "UpToDate"
    return Completed(name="Ran" if ran else "UpToDate")


def _on_workers(stale: set[str]) -> State[Any]:
    """Every stale stage on a worker of its kind; then what registering reads is pulled."""
    revision, ran = pools.commit(), False
    if raw_files():
        dvc(Path(), "push", *map(str, raw_files()))
    for stage in stages(load_params().data):
        if stage not in stale:
            continue
        state = pools.send(stage, revision, return_state=True)
        if not state.is_completed():
            return Failed(message=state.message)
        if state.name != "UpToDate":
            ran, stale = True, stale_elsewhere()
    dvc(Path(), "pull", "--force", "--allow-missing", *READ)
    return Completed(name="Ran" if ran else "UpToDate")


def _check_crashes() -> None:
    """A crashed run is started again (prefect.yaml); raises ValueError if that did not help several times in a row."""
    if deployment.id is None:
        return
    of_ours = DeploymentFilter(id=DeploymentFilterId(any_=[deployment.id]))
    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs(deployment_filter=of_ours, sort=FlowRunSort.EXPECTED_START_TIME_DESC,
                                     limit=MOST_CRASHES + 1)
    before = [run for run in runs if str(run.id) != str(flow_run.id)][:MOST_CRASHES]
    if len(before) == MOST_CRASHES and all(run.state and run.state.is_crashed() for run in before):
        raise ValueError(f"the last {MOST_CRASHES} runs crashed: {before[0].state.message if before[0].state else ''}; "
                         "see the worker's log; this run ends the row, and the next one tries again")


@contextmanager
def _parent_run() -> Iterator[Run]:
    """The MLflow run that those of the phases and of the evaluation nest under."""
    from onediff.tracking import parent_run

    with parent_run("retrain", load_params()) as run:
        yield run


def main() -> None:
    state = command.run(retrain, first=alone())
    if not state.is_completed():
        sys.exit(f"onediff: {state.message}")


if __name__ == "__main__":
    main()
