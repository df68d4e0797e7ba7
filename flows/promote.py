"""The flows `promote` and `rollback`: all that changes the registry's aliases on a shared server, one at a time."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from prefect import flow, pause_flow_run
from prefect.client.schemas.objects import State
from prefect.concurrency.sync import concurrency
from prefect.input import RunInput
from prefect.runtime import flow_run
from prefect.states import Completed, Failed

from flows.notify import tell
from flows.tasks import change, judge, keep_rescored, propose, score_again, turn_back
from onediff import registry

SLOT = "onediff-registry"  # global concurrency limit of 1, made by `make deploy`


class Approval(RunInput):
    """What a person answers in Prefect's page."""

    approve: bool
    name: str
    reason: str = ""


@flow(name="promote")
def promote(version: str | None = None, why: str | None = None, candidate: str | None = None) -> State[Any]:
    """The version, or else the candidate, becomes champion if mlflow/promotion.yaml lets it; refused is no failure.

    `candidate`: the version that becomes the candidate first.
    """
    try:
        if candidate:
            with _alone():
                propose(candidate, by=_name())
        again = registry.champion_to_score_again(version)
        if again:
            keep_rescored(again.rpartition("/")[2], score_again(again))
        by, approved = _name(), None
        hours = registry.load_rules().approval_h
        if hours is not None:
            opinion = judge(version)
            if opinion.promoted and not opinion.reasons:  # nobody is asked about a refused version or the champion
                approved = opinion.case
                by = _asked(approved, hours)
        with _alone():
            verdict = change(version, by=by, why=why, approved=approved)
    except (ValueError, OSError) as error:
        tell("failure", f"promotion of {version or 'the candidate'} failed", why=str(error),
             then="onediff registry trail")
        return Failed(message=str(error))
    return _told(verdict)


@flow(name="rollback")
def rollback(why: str | None = None) -> State[Any]:
    """`previous` becomes champion again."""
    try:
        with _alone():
            version = turn_back(by=_name(), why=why)
    except (ValueError, OSError) as error:
        tell("failure", "a rollback failed", why=str(error), then="onediff registry trail")
        return Failed(message=str(error))
    tell("rollback", f"version {version} is champion again", why=why or "no reason was given",
         then="onediff registry trail")
    return Completed(message=f"version {version} is champion again")


def _told(verdict: registry.Verdict) -> State[Any]:
    if not verdict.promoted:
        reasons = "; ".join(verdict.reasons)
        tell("refusal", f"version {verdict.version} is refused", why="\n".join(f"* {item}" for item in verdict.reasons),
             then=f"onediff report --against models:/{registry.NAME}@{registry.CHAMPION}")
        return Completed(name="Refused", message=f"version {verdict.version} is refused: {reasons}")
    if verdict.reasons:  # it is champion already
        return Completed(message=f"version {verdict.version} {verdict.reasons[0]}")
    was = f"; version {verdict.replaced} was" if verdict.replaced else ""
    tell("promotion", f"version {verdict.version} is champion{was}", why="it meets mlflow/promotion.yaml",
         then="onediff registry rollback")
    return Completed(name="Promoted", message=f"version {verdict.version} is champion{was}")


def _asked(case: registry.PromotionCase | None, hours: float) -> str:
    """Who said yes. Raises ValueError if the person says no or gives no name; Prefect fails the flow if nobody answers
    in time.
    """
    answer = pause_flow_run(wait_for_input=Approval.with_initial_data(
        description=f"Shall {case} become champion?", approve=False, name=""), timeout=round(hours * 3600))
    if not answer.approve:
        raise ValueError(f"{answer.name or 'nobody named'} did not approve: {answer.reason or 'no reason given'}")
    if not answer.name.strip():
        raise ValueError("the approval must hold the name of the person, got none: start the promotion again")
    return f"{_name()}, approved by {answer.name.strip()}"


@contextmanager
def _alone() -> Iterator[None]:
    """On a shared server the only one who changes aliases; a store of this machine has its own lock."""
    if not registry.shared():
        yield
        return
    with concurrency(SLOT, strict=True), registry.sole_writer():
        yield


def _name() -> str:
    return f"flow run {flow_run.name} ({flow_run.id})"


if __name__ == "__main__":
    sys.exit("onediff: this module holds flows for deployments; 'onediff registry promote [VERSION]' promotes")
