"""Promotion and rollback asked for from elsewhere: on a shared server by the deployments, else in this process."""

from __future__ import annotations

from typing import Any

from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound

from flows import promote as flows
from flows.server import temporary_server
from onediff import registry

PROMOTE, ROLLBACK = "promote/promote", "rollback/rollback"


def promote(version: str | None = None, why: str | None = None, candidate: str | None = None) -> str:
    """The flow's last word: promoted, or refused and why. Raises ValueError if it failed."""
    parameters = {"version": version, "why": why, "candidate": candidate}
    if registry.shared():
        return _submit(PROMOTE, parameters)
    with temporary_server():
        return _word(flows.promote(**parameters, return_state=True))


def rollback(why: str | None = None) -> str:
    """The same. Raises ValueError if there is nothing to roll back to."""
    if registry.shared():
        return _submit(ROLLBACK, {"why": why})
    with temporary_server():
        return _word(flows.rollback(why=why, return_state=True))


def _submit(deployment: str, parameters: dict[str, Any]) -> str:
    try:
        run = run_deployment(deployment, parameters=parameters, timeout=None, poll_interval=1)
    except ObjectNotFound:
        raise ValueError(f"Prefect has no deployment '{deployment}': 'make deploy' makes it; set PREFECT_API_URL to "
                         "its server") from None
    assert isinstance(run, FlowRun), "called from a thread without an event loop"
    return _word(run.state)


def _word(state: Any) -> str:
    if not state.is_completed():
        raise ValueError(state.message or state.name)
    return str(state.message)
