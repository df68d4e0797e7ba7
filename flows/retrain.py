"""`python -m flows.retrain` runs the stages of dvc.yaml in order, then registers the model and tries to promote it."""

import os
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from prefect import State, flow, get_client
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId
from prefect.client.schemas.sorting import FlowRunSort
from prefect.runtime import deployment, flow_run
from prefect.states import Completed, Failed

from flows import command, deployments, tasks
from flows.names import dated_name
from flows.notify import notify, publish_scores
from flows.pipeline import dvc, raw_files, stages, stale_elsewhere, stale_stages
from flows.processes import pipeline_lock
from flows.promote import promote
from flows.stage import commit_for_workers, run_on_worker
from onediff import paths, registry
from onediff.config import load_params, load_runtime
from onediff.files import disk_full_named
from onediff.git import CURE, git, git_paths, head
from onediff.repro.preflight import check_inputs
from onediff.tracking import parent_run

READ_TO_REGISTER = (paths.DIFFCAP, paths.QUARANTINE, paths.VALIDATION_REPORT, paths.DIFFCAP_REPORTS, paths.TRAINED,
                    paths.RUNS / "align.json", paths.RUNS / "tune.json", paths.CAPTIONS, paths.SCORED, paths.REPORT)
MAX_CRASHES = 3
WITHOUT_GIT = ("this folder is not in a git commit, so there is no branch with the results, the lineage of the version "
               f"has no commit, and the promotion rule clean_lineage cannot be met. {CURE}")


@flow(name="retrain", flow_run_name=dated_name)
def retrain() -> State[Any]:
    """Run the DVC stages that are out of date, register the model, and promote it if mlflow/promotion.yaml allows it.

    The stages run in this folder, or on Prefect workers if runtime.yaml contains work pools. If a stage fails, the flow
    ends with the stage's message.
    """
    try:
        _check_crashes()
        with pipeline_lock(), disk_full_named(Path(".onediff")):
            state = _retrain()
    # The flow returns a Failed state instead of an exception, because Prefect would print a complete traceback.
    except (ValueError, OSError) as error:
        state = Failed(message=str(error))
    if state.is_failed():
        notify("failure", "a retraining failed", why=str(state.message), then=deployments.RETRAIN_COMMAND)
    return state


def _retrain() -> State[Any]:
    runtime = load_runtime()
    if runtime.pools:
        stale, run_stages = stale_elsewhere(), run_on_workers
    else:
        # The inputs are not checked here if workers run the stages, because each worker checks its own machine.
        check_inputs(load_params())
        stale, run_stages = stale_stages(), run_here
    with parent_run("retrain", load_params()) if stale else nullcontext() as run:
        state = run_stages(stale)
        if not state.is_completed():
            if run:
                run.fail(str(state.message))
            return state
        if state.name == "Ran":
            commit_results(str(flow_run.id).partition("-")[0], remote=runtime.git_remote)
            if head() is None:
                print(f"onediff: {WITHOUT_GIT}")
        publish_scores(paths.METRICS, "scores")
        version = tasks.register()
    # The version is passed as `candidate`, because a version passed by number is promoted even after a rollback of it.
    message = (deployments.submit(deployments.PROMOTE, candidate=version) if registry.shared()
               else deployments.message_of(promote(candidate=version, return_state=True)))
    return Completed(name=state.name, message=message)


def run_here(stale: set[str]) -> State[Any]:
    """Run the stale stages in this folder, and every stage that follows a stage that ran."""
    ran = False
    for stage in stages(load_params().data):
        if ran or stage in stale:
            state = tasks.repro(stage, return_state=True)
            if not state.is_completed():
                return Failed(message=state.message)
            ran = ran or state.name != "UpToDate"
    return Completed(name="Ran" if ran else "UpToDate")


def run_on_workers(stale: set[str]) -> State[Any]:
    """Run every stale stage on a worker with or without GPU, as the stage needs; pull the outputs for registration."""
    revision, ran = commit_for_workers(), False
    if raw_files():
        dvc(Path(), "push", *map(str, raw_files()))
    for stage in stages(load_params().data):
        if stage in stale:
            state = run_on_worker(stage, revision, return_state=True)
            if not state.is_completed():
                return Failed(message=state.message)
            if state.name != "UpToDate":
                ran, stale = True, stale_elsewhere()
    dvc(Path(), "pull", "--force", "--allow-missing", *map(str, READ_TO_REGISTER))
    return Completed(name="Ran" if ran else "UpToDate")


def commit_results(run: str, *, remote: str | None = None) -> str | None:
    """Commit dvc.lock, the metrics and the .dvc files on a new branch retrain/RUN, and return the name of the branch.

    The parent of the new commit is the checked-out commit. The checked-out branch and the working tree do not change.
    If `remote` is given, the branch is pushed there. Returns None if nothing changed or if this folder is not in a git
    commit. Raises ValueError with git's message if git fails or if the branch cannot be pushed.
    """
    if head() is None:
        return None
    changed = git_paths("diff", "--relative", "--name-only", "HEAD", "--", "dvc.lock", "data")
    changed += git_paths("ls-files", "--others", "--exclude-standard", "--", "dvc.lock", "data/*.dvc")
    if not changed:
        return None
    branch = f"retrain/{run}"
    with tempfile.TemporaryDirectory() as scratch:
        index = {"GIT_INDEX_FILE": str(Path(scratch) / "index")}
        git("read-tree", "HEAD", env=index)
        git("add", "--", *changed, env=index)
        tree = git("write-tree", env=index)
    defaults = {f"GIT_{role}_{part}": value for role in ("AUTHOR", "COMMITTER")
                for part, value in (("NAME", "OneDiff"), ("EMAIL", "onediff@localhost"))}
    commit = git("commit-tree", tree, "-p", "HEAD", "-m", f"retrain: results of run {run}", env=defaults | os.environ)
    git("update-ref", f"refs/heads/{branch}", commit)
    if remote:
        git("push", "--quiet", "--force", remote, f"refs/heads/{branch}")
    return branch


def _check_crashes() -> None:
    """Raise ValueError if the last MAX_CRASHES flow runs of this Prefect deployment all crashed.

    An automation in prefect.yaml starts a crashed run again, and without this check it would do so forever.
    """
    if deployment.id is None:
        return
    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs(deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[deployment.id])),
                                     sort=FlowRunSort.EXPECTED_START_TIME_DESC, limit=MAX_CRASHES + 1)
    before = [run for run in runs if str(run.id) != str(flow_run.id)][:MAX_CRASHES]
    if len(before) == MAX_CRASHES and all(run.state and run.state.is_crashed() for run in before):
        raise ValueError(f"the last {MAX_CRASHES} retrainings crashed: "
                         f"{before[0].state.message if before[0].state else ''}; see the worker's log for the reason; "
                         "this run does nothing, and the next run tries again")


if __name__ == "__main__":
    command.run(retrain, lock=pipeline_lock())
