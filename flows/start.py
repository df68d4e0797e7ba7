"""Starting a retraining from another flow, on whatever worker serves the deployment."""

from __future__ import annotations

from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound

DEPLOYMENT = "retrain/retrain"


def start_retraining(key: str) -> str:
    """Submits the deployment without waiting; what happened, in words. One run for each key, however often it is asked.

    A deployment that does not exist is said, and fails nothing: what was found out stays so.
    """
    try:
        run = run_deployment(DEPLOYMENT, timeout=0, idempotency_key=key, as_subflow=False)
    except (ObjectNotFound, ValueError) as error:
        return f"no retraining was started: {DEPLOYMENT}: {' '.join(str(error).split())}; 'make deploy' deploys it"
    return f"retraining '{getattr(run, 'name', DEPLOYMENT)}' was submitted"
