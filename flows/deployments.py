"""Run deployments of the Prefect server: a retraining, a promotion, a rollback."""

from typing import Any

from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound

RETRAIN, PROMOTE, ROLLBACK = "retrain/retrain", "promote/promote", "rollback/rollback"
RETRAIN_COMMAND = f"prefect deployment run {RETRAIN}"


def start_retraining(key: str) -> str:
    """Submit a retraining without waiting for it, and return a sentence that says what happened.

    Prefect starts only one retraining for each `key`. If the deployment does not exist, the sentence says so; this is
    not an error, because the caller's own work has succeeded.
    """
    try:
        run = run_deployment(RETRAIN, timeout=0, idempotency_key=key, as_subflow=False)
    except (ObjectNotFound, ValueError) as error:
        return f"no retraining was started: {RETRAIN}: {' '.join(str(error).split())}; 'make deploy' deploys it"
    return f"retraining '{getattr(run, 'name', RETRAIN)}' was submitted"


def submit(deployment: str, **parameters: Any) -> str:
    """Run the Prefect deployment of the flow `promote` or `rollback`, wait for it, and return the flow's final message.

    The message says whether the model version became the champion or was refused. Raises ValueError if the flow failed,
    or if Prefect has no such deployment.
    """
    try:
        run = run_deployment(deployment, parameters=parameters, timeout=None, poll_interval=1)
    except ObjectNotFound:
        raise ValueError(f"the Prefect server has no deployment '{deployment}': 'make deploy' creates it; "
                         "PREFECT_API_URL must be the address of the server with the deployments") from None
    assert isinstance(run, FlowRun), "submit must be called from a thread without an event loop"
    return message_of(run.state)


def message_of(state: Any) -> str:
    """Return the message of a flow's final state. Raises ValueError with this message if the flow did not complete."""
    if not state.is_completed():
        raise ValueError(state.message or state.name)
    return str(state.message)
