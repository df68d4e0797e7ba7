"""Runs deployments of the Prefect server: a retraining, a promotion, a rollback."""

from typing import Any

from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound

RETRAIN, PROMOTE, ROLLBACK = "retrain/retrain", "promote/promote", "rollback/rollback"
RETRAIN_COMMAND = f"prefect deployment run {RETRAIN}"


def start_retraining(key: str) -> str:
    """Submits a retraining without waiting for it, once for each key; returns a sentence that says what happened.

    A deployment that does not exist is no error, because the caller's own result stays valid.
    """
    try:
        run = run_deployment(RETRAIN, timeout=0, idempotency_key=key, as_subflow=False)
    except (ObjectNotFound, ValueError) as error:
        return f"no retraining was started: {RETRAIN}: {' '.join(str(error).split())}; 'make deploy' deploys it"
    return f"retraining '{getattr(run, 'name', RETRAIN)}' was submitted"


def submit(deployment: str, **parameters: Any) -> str:
    """Runs the deployment of `promote` or `rollback` and waits; returns the flow's message, which says whether the
    version is champion or was refused. Raises ValueError if the flow failed, or if Prefect has no such deployment.
    """
    try:
        run = run_deployment(deployment, parameters=parameters, timeout=None, poll_interval=1)
    except ObjectNotFound:
        raise ValueError(f"Prefect has no deployment '{deployment}': 'make deploy' makes it; set PREFECT_API_URL to "
                         "its server") from None
    assert isinstance(run, FlowRun), "called from a thread without an event loop"
    return message_of(run.state)


def message_of(state: Any) -> str:
    """The message of a completed flow. Raises ValueError with the message of any other one."""
    if not state.is_completed():
        raise ValueError(state.message or state.name)
    return str(state.message)
