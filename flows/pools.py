"""Stages on other machines: each goes to the work pool of its kind, as a run of flow `stage`; its answer comes back."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import get_client, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, ArtifactFilterType
from prefect.client.schemas.objects import FlowRun, State
from prefect.deployments import run_deployment
from prefect.states import Cancelling, Completed, Failed

from flows.pipeline import LOCK, needs, raw_files, small_outs
from flows.stage import ANSWER
from onediff.files import write_text
from onediff.git import CURE, git, head

POLL_S = 2.0
TRIES = 3  # a run whose worker died is sent again


def commit() -> str:
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


@task(task_run_name="{stage}", cache_policy=NO_CACHE)
def send(stage: str, revision: str) -> State[Any]:
    """Runs a stage on a worker; its state says what happened, as that of `repro` does.

    The same stage on the same inputs is one run, however often it is sent: a flow that was restarted finds the run
    that it had begun. One whose worker died is sent again, and training goes on from its checkpoint.
    """
    kept = [LOCK, *small_outs(), *raw_files()]
    files = {str(path): path.read_text(encoding="utf-8") for path in kept if path.exists()}
    key = hashlib.sha256(json.dumps([stage, revision, files], sort_keys=True).encode()).hexdigest()[:16]
    lost = 0
    for number in range(1000):
        run, old = _begin(stage, f"{key}-{number}", {"name": stage, "commit": revision, "files": files})
        with _cancelled_with_us(run):
            state = _wait(run)
        if state.is_completed():
            _lay(run.id)
            return Completed(name="UpToDate" if old else state.name, message=state.message)
        lost += state.is_crashed() and not old
        if not old and (not state.is_crashed() or lost == TRIES):  # an old one failed in an earlier retraining
            return Failed(message=f"{stage}: {state.message or state.name}")
    raise AssertionError("a thousand failed runs of one stage")


def _begin(stage: str, key: str, parameters: dict[str, Any]) -> tuple[FlowRun, bool]:
    """The run with this key, which is sent unless there is one; and whether that had ended before."""
    run = run_deployment(f"stage/{needs(stage)}", parameters=parameters, idempotency_key=key, timeout=0)
    assert isinstance(run, FlowRun), "called from a thread without an event loop"
    return run, bool(run.state and run.state.is_final())


def _wait(run: FlowRun) -> State[Any]:
    with get_client(sync_client=True) as client:
        while True:
            state = client.read_flow_run(run.id).state
            if state is not None and state.is_final():
                return state
            time.sleep(POLL_S)


@contextmanager
def _cancelled_with_us(run: FlowRun) -> Iterator[None]:
    """A run is cancelled when this one is; the worker then tells the stage to write its checkpoint."""
    try:
        yield
    except BaseException:  # a cancelled flow raises Prefect's TerminationSignal, which is no Exception
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(run.id, Cancelling())
        raise


def _lay(run_id: UUID) -> None:
    """What the worker handed back, in this folder: dvc.lock and the metrics that git keeps."""
    wanted = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run_id]), type=ArtifactFilterType(any_=[ANSWER]))
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(artifact_filter=wanted)
    allowed = {str(path) for path in (LOCK, *small_outs())}
    for name, text in json.loads(str(found[0].data)).items():
        if name not in allowed:
            raise ValueError(f"flow run {run_id} handed back '{name}', which is neither dvc.lock nor a metrics file")
        write_text(Path(name), text)
