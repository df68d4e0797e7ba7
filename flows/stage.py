"""Run one DVC stage on another machine, which shares the DVC remote and the Prefect server with this machine.

On the machine of the flow `retrain`, the task `run_on_worker` submits the stage and waits for it. On the worker's
machine, the flow `stage` runs the stage in a separate git worktree, so that the worker's clone stays unchanged, and
returns dvc.lock and the metrics as an artifact.
"""

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from prefect import State, flow, get_client, task
from prefect.artifacts import Artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, ArtifactFilterType
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment
from prefect.states import Cancelling, Completed, Failed

from flows.pipeline import dvc, inputs_of, metric_files, needs, outcome, raw_files, reason
from flows.processes import DVC, pipeline_lock, stream
from onediff.files import key_of, write_text
from onediff.git import CURE, git, head
from onediff.paths import DVC_LOCK, RUNTIME

POLL_S = 2.0
MAX_CRASHES = 3  # maximum number of times that a stage is submitted if its worker dies
WORK = Path(".onediff/work")
ARTIFACT = "onediff-stage"  # type of the Prefect artifact in which a worker returns dvc.lock and the metrics


def commit_for_workers() -> str:
    """Return the commit that the workers check out.

    Raises ValueError if code or params.yaml have changes that are not committed, because workers would not have them.
    """
    revision = head()
    if revision is None:
        raise ValueError(f"this folder has no git commit that the workers of the work pools could check out: {CURE}")
    changed = [line[3:] for line in git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!dvc.lock",
                                        ":!data").splitlines()]
    if changed:
        raise ValueError(f"git: {', '.join(changed[:5])} changed since commit {revision[:12]}; workers check out that "
                         "commit, so commit the changes first")
    return revision


@task(task_run_name="{name}", cache_policy=NO_CACHE)
def run_on_worker(name: str, revision: str) -> State[Any]:
    """Run a DVC stage on a worker. The name of the returned Prefect state is Ran, Restored or UpToDate.

    Prefect's idempotency key is computed from the stage, the commit and the submitted files, so a restarted flow waits
    for the run that it had submitted before. A stage whose worker died is submitted again, and training continues from
    its checkpoint.
    """
    files = {str(path): path.read_text(encoding="utf-8") for path in (DVC_LOCK, *metric_files(), *raw_files())
             if path.exists()}
    key, crashes = key_of([name, revision, files])[:16], 0
    for number in range(1000):
        run = run_deployment(f"stage/{needs(name)}", idempotency_key=f"{key}-{number}", timeout=0,
                             parameters={"name": name, "commit": revision, "files": files})
        assert isinstance(run, FlowRun), "run_on_worker must be called from a thread without an event loop"
        # If true, Prefect returned an ended run that an earlier retraining had submitted with an equal key.
        had_ended = bool(run.state and run.state.is_final())
        state = _final_state(run)
        if state.is_completed():
            write_outputs(run)
            return Completed(name="UpToDate" if had_ended else state.name, message=state.message)
        crashes += state.is_crashed() and not had_ended
        if not had_ended and (not state.is_crashed() or crashes == MAX_CRASHES):
            return Failed(message=f"{name}: {state.message or state.name}")
    raise AssertionError("a thousand runs of one stage have failed; see the log of its last run")


def _final_state(run: FlowRun) -> State[Any]:
    """Wait until the flow run has ended, and return its final state.

    If the calling flow is cancelled, `run` is cancelled too. The worker then sends SIGTERM to the stage, which writes a
    checkpoint.
    """
    try:
        with get_client(sync_client=True) as client:
            while not ((state := client.read_flow_run(run.id).state) and state.is_final()):
                time.sleep(POLL_S)
        return state
    # In a cancelled flow, Prefect raises TerminationSignal, which does not derive from Exception.
    except BaseException:
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(run.id, Cancelling())
        raise


def write_outputs(run: FlowRun) -> None:
    """Write into this folder the dvc.lock and the metrics files that a worker returned.

    Raises ValueError if the worker returned any other file.
    """
    outputs = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run.id]),
                             type=ArtifactFilterType(any_=[ARTIFACT]))
    with get_client(sync_client=True) as client:
        artifact = client.read_artifacts(artifact_filter=outputs)[0]
    allowed = {str(path) for path in (DVC_LOCK, *metric_files())}
    for name, text in json.loads(str(artifact.data)).items():
        if name not in allowed:
            raise ValueError(f"flow run {run.id} returned the file '{name}'; a worker may return only dvc.lock and "
                             "the metrics files of dvc.yaml")
        write_text(Path(name), text)


@flow(name="stage", flow_run_name="{name}")
def stage(name: str, commit: str, files: dict[str, str]) -> State[Any]:
    """Run a stage of dvc.yaml at a git commit on the worker's machine, and push its outputs to the DVC remote.

    `files` maps paths to texts: dvc.lock, the metrics and the .dvc files of the machine that submitted the stage.
    """
    try:
        with pipeline_lock(WORK.with_suffix(".lock")):
            check_out(commit)
            write_inputs(files)
            result, outputs = run_stage(name)
    except (ValueError, OSError) as error:
        return Failed(message=f"{name}: {error}")
    Artifact(type=ARTIFACT, key=ARTIFACT, description=name, data=outputs).create()
    return Completed(name=result, message=f"{name}: {result}")


def check_out(commit: str) -> None:
    """Check the commit out in the worker's worktree, after `git fetch` if the clone does not have the commit.

    Raises ValueError if git fails.
    """
    unfetched = ""
    try:
        git("cat-file", "-e", f"{commit}^{{commit}}")
    except ValueError:
        try:
            git("fetch", "--quiet", "--all")
        # An unreachable remote is no error if the commit could be fetched from another remote.
        except ValueError as error:
            unfetched = f"{error}; "
    try:
        if (WORK / ".git").exists():
            git("checkout", "--quiet", "--force", "--detach", commit, root=WORK)
        else:
            git("worktree", "prune")
            shutil.rmtree(WORK, ignore_errors=True)
            git("worktree", "add", "--quiet", "--detach", str(WORK), commit)
    except ValueError as error:
        raise ValueError(f"{Path.cwd()}: commit {commit[:12]} cannot be checked out ({unfetched}{error}): push it to a "
                         "git remote of this clone, or run 'git fetch' here") from None


def write_inputs(files: dict[str, str]) -> None:
    """Write the submitted files into the worktree, and copy the worker's runtime.yaml and DVC configuration there.

    Raises ValueError if the path of a file is outside the project.
    """
    for name, text in files.items():
        path = WORK / name
        if (path.is_absolute() and WORK.absolute() not in path.absolute().parents) or ".." in Path(name).parts:
            raise ValueError(f"the submitted file '{name}' is outside the project folder; nothing was written")
        write_text(path, text)
    for local in (RUNTIME, Path(".dvc/config.local")):
        (WORK / local).unlink(missing_ok=True)
        if local.exists():
            shutil.copy(local, WORK / local)
    dvc(WORK, "cache", "dir", "--local", str(Path(".dvc/cache").absolute()))


def run_stage(name: str) -> tuple[str, dict[str, str]]:
    """Run a DVC stage in the worktree. Return Ran, Restored or UpToDate, and dvc.lock and metrics as {path: text}.

    Raises ValueError if the stage failed or if one of its inputs is missing.
    """
    inputs, left_behind = inputs_of(name, WORK)
    for path in left_behind:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if inputs:
        dvc(WORK, "pull", "--force", "--allow-missing", *inputs)
    missing = [path for path in inputs if not (WORK / path.removesuffix(".dvc")).exists()]
    if missing:
        others = f", and {len(missing) - 1} more inputs of the stage are missing" if len(missing) > 1 else ""
        raise ValueError(f"{missing[0]} is not in the DVC remote{others}: run 'dvc push' on the machine that made it, "
                         "or remove its entry from dvc.lock")
    start = time.time()
    status, stdout = stream([*DVC, "repro", "--single-item", "--pull", "--allow-missing", name], WORK)
    if status:
        raise ValueError(f"failed{reason(WORK, start)}")
    dvc(WORK, "push", "--run-cache", name)
    return outcome(stdout), {str(path): (WORK / path).read_text(encoding="utf-8")
                             for path in (DVC_LOCK, *metric_files(WORK)) if (WORK / path).exists()}


if __name__ == "__main__":
    sys.exit("onediff: this module contains flows for deployments; 'dvc repro --single-item STAGE' runs a stage")
