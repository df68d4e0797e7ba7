"""One DVC stage on a worker's machine, which shares DVC's remote and the Prefect server with the machine of `retrain`.

The task `run_on_worker` sends the stage and waits. The flow `stage` runs it on the worker, in a git worktree of its
own, so that the worker's clone stays unchanged, and returns dvc.lock and the metrics as an artifact.
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
MAX_CRASHES = 3  # a run whose worker died is sent again
WORK = Path(".onediff/work")
ARTIFACT = "onediff-stage"  # type of the artifact that carries the stage's results back


# --- on the machine of `retrain` ------------------------------------------------------------------------------------


def commit_for_workers() -> str:
    """The commit that the workers check out. Raises ValueError if the code or params.yaml here is not that commit."""
    revision = head()
    if revision is None:
        raise ValueError(f"work pools need a git commit of this folder, which the workers check out: {CURE}")
    changed = [line[3:] for line in git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!dvc.lock",
                                        ":!data").splitlines()]
    if changed:
        raise ValueError(f"git: {', '.join(changed[:5])} changed since commit {revision[:12]}, which the workers check "
                         "out: commit it first")
    return revision


@task(task_run_name="{name}", cache_policy=NO_CACHE)
def run_on_worker(name: str, revision: str) -> State[Any]:
    """Runs a stage on a worker. Its state is named as that of `repro`: Ran, Restored or UpToDate.

    The same stage on the same inputs is one run, however often it is sent: a flow that was restarted waits for the run
    that it had begun. A run whose worker died is sent again, and training continues from its checkpoint.
    """
    files = {str(path): path.read_text(encoding="utf-8") for path in (DVC_LOCK, *metric_files(), *raw_files())
             if path.exists()}
    key, crashes = key_of([name, revision, files])[:16], 0
    for number in range(1000):
        run = run_deployment(f"stage/{needs(name)}", idempotency_key=f"{key}-{number}", timeout=0,
                             parameters={"name": name, "commit": revision, "files": files})
        assert isinstance(run, FlowRun), "called from a thread without an event loop"
        had_ended = bool(run.state and run.state.is_final())  # in an earlier retraining
        state = _final_state(run)
        if state.is_completed():
            write_outputs(run)
            return Completed(name="UpToDate" if had_ended else state.name, message=state.message)
        crashes += state.is_crashed() and not had_ended
        if not had_ended and (not state.is_crashed() or crashes == MAX_CRASHES):
            return Failed(message=f"{name}: {state.message or state.name}")
    raise AssertionError("a thousand failed runs of one stage")


def _final_state(run: FlowRun) -> State[Any]:
    """Waits until the run has ended. If this flow is cancelled, it cancels the run, whose worker then signals the stage
    to write its checkpoint.
    """
    try:
        with get_client(sync_client=True) as client:
            while not ((state := client.read_flow_run(run.id).state) and state.is_final()):
                time.sleep(POLL_S)
        return state
    except BaseException:  # a cancelled flow raises Prefect's TerminationSignal, which is no Exception
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(run.id, Cancelling())
        raise


def write_outputs(run: FlowRun) -> None:
    """Writes dvc.lock and the metrics of the worker into this folder. Raises ValueError for any other file."""
    outputs = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run.id]),
                             type=ArtifactFilterType(any_=[ARTIFACT]))
    with get_client(sync_client=True) as client:
        artifact = client.read_artifacts(artifact_filter=outputs)[0]
    allowed = {str(path) for path in (DVC_LOCK, *metric_files())}
    for name, text in json.loads(str(artifact.data)).items():
        if name not in allowed:
            raise ValueError(f"flow run {run.id} handed back '{name}', which is neither dvc.lock nor a metrics file")
        write_text(Path(name), text)


# --- on the worker's machine ----------------------------------------------------------------------------------------


@flow(name="stage", flow_run_name="{name}")
def stage(name: str, commit: str, files: dict[str, str]) -> State[Any]:
    """Runs a stage of dvc.yaml at a commit, and pushes its outs to DVC's remote.

    `files`: dvc.lock, the metrics and the .dvc files of the sender.
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
    """Checks the commit out in the worktree, after a fetch if this clone lacks it. Raises ValueError if git refuses."""
    unfetched = ""
    try:
        git("cat-file", "-e", f"{commit}^{{commit}}")
    except ValueError:
        try:
            git("fetch", "--quiet", "--all")
        except ValueError as error:  # another remote may have had the commit
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
                         "git remote of this clone, or 'git fetch' here") from None


def write_inputs(files: dict[str, str]) -> None:
    """Writes the sender's files into the worktree, and this machine's runtime.yaml, remotes and cache."""
    for name, text in files.items():
        path = WORK / name
        if (path.is_absolute() and WORK.absolute() not in path.absolute().parents) or ".." in Path(name).parts:
            raise ValueError(f"the sender's file '{name}' lies outside the project")
        write_text(path, text)
    for local in (RUNTIME, Path(".dvc/config.local")):
        (WORK / local).unlink(missing_ok=True)
        if local.exists():
            shutil.copy(local, WORK / local)
    dvc(WORK, "cache", "dir", "--local", str(Path(".dvc/cache").absolute()))


def run_stage(name: str) -> tuple[str, dict[str, str]]:
    """Ran, Restored or UpToDate, and dvc.lock and the metrics afterwards. Raises ValueError if the stage failed or if
    one of its inputs is missing.
    """
    inputs, left_behind = inputs_of(name, WORK)
    for path in left_behind:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if inputs:
        dvc(WORK, "pull", "--force", "--allow-missing", *inputs)
    missing = [path for path in inputs if not (WORK / path.removesuffix(".dvc")).exists()]
    if missing:
        raise ValueError(f"{missing[0]} is not in DVC's remote, nor {len(missing) - 1} more that it reads: 'dvc push' "
                         "on the machine that made it, or remove its entry from dvc.lock")
    start = time.time()
    status, stdout = stream([*DVC, "repro", "--single-item", "--pull", "--allow-missing", name], WORK)
    if status:
        raise ValueError(f"failed{reason(WORK, start)}")
    dvc(WORK, "push", "--run-cache", name)
    return outcome(stdout), {str(path): (WORK / path).read_text(encoding="utf-8")
                             for path in (DVC_LOCK, *metric_files(WORK)) if (WORK / path).exists()}


if __name__ == "__main__":
    sys.exit("onediff: this module holds flows for deployments; 'dvc repro --single-item STAGE' runs a stage")
