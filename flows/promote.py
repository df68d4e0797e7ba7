"""The flows `promote` and `rollback`, the only code that changes the registry's aliases on a shared server."""

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from prefect import State, flow, pause_flow_run
from prefect.concurrency.sync import concurrency
from prefect.input import RunInput
from prefect.states import Completed, Failed

from flows import tasks
from flows.names import dated_name
from flows.notify import notify
from onediff import registry
from onediff.paths import CHAMPION

SLOT = "onediff-registry"  # name of the Prefect concurrency limit (one flow at a time) that `make deploy` creates


class Approval(RunInput):
    """The form on Prefect's web page in which a person approves or refuses a promotion."""

    approve: bool
    name: str
    reason: str = ""


@flow(name="promote", flow_run_name=dated_name)
def promote(version: str | None = None, why: str | None = None, candidate: str | None = None) -> State[Any]:
    """Make a model version the champion if it meets mlflow/promotion.yaml. A refused version does not fail the flow.

    `version` is the version to promote, by default the one with the alias `candidate`. If `candidate` is given, that
    version receives the alias first.
    """
    try:
        if candidate:
            with _slot(), registry.sole_writer():
                tasks.propose(candidate, by=tasks.author())
        outdated = registry.champion_to_score_again(version)
        if outdated:
            tasks.rescore(outdated.rpartition("/")[2], tasks.score_again(outdated))
        by, approved = tasks.author(), None
        hours = registry.load_rules().approval_h
        if hours is not None:
            verdict = tasks.assess(version)
            # No person has to approve a version that is refused or is the champion already.
            if verdict.promoted and not verdict.reasons:
                approved = verdict.case
                by = _approval(approved, hours)
        with _slot(), registry.sole_writer():
            verdict = tasks.promote(version, by=by, why=why, approved=approved)
    except (ValueError, OSError) as error:
        notify("failure", f"promotion of {version or 'the candidate'} failed", why=str(error),
               then="onediff registry trail")
        return Failed(message=str(error))
    print(f"version {verdict.version}: {'champion' if verdict.promoted else 'refused'}", *verdict.reasons, sep="\n  ")
    return _report(verdict)


def _report(verdict: registry.Verdict) -> State[Any]:
    if not verdict.promoted:
        notify("refusal", f"version {verdict.version} is refused",
               why="\n".join(f"* {reason}" for reason in verdict.reasons),
               then=f"onediff report --against {CHAMPION}")
        return Completed(name="Refused", message=f"version {verdict.version} is refused: {'; '.join(verdict.reasons)}")
    if verdict.reasons:  # The version was the champion before this run.
        return Completed(message=f"version {verdict.version} {verdict.reasons[0]}")
    what = f"version {verdict.version} is champion" + (
        f" and replaces version {verdict.replaced}" if verdict.replaced else "")
    notify("promotion", what, why="it meets mlflow/promotion.yaml", then="onediff registry rollback")
    return Completed(name="Promoted", message=what)


@flow(name="rollback", flow_run_name=dated_name)
def rollback(why: str | None = None) -> State[Any]:
    """Make the model version with the alias `previous` the champion again."""
    try:
        with _slot(), registry.sole_writer():
            version = tasks.rollback(by=tasks.author(), why=why)
    except (ValueError, OSError) as error:
        notify("failure", "a rollback failed", why=str(error), then="onediff registry trail")
        return Failed(message=str(error))
    what = f"version {version} is champion again"
    notify("rollback", what, why=why or "no reason was given", then="onediff registry trail")
    return Completed(message=what)


def _approval(case: registry.PromotionCase | None, hours: float) -> str:
    """Pause the flow until a person approves the promotion. Return a text that names the flow run and the person.

    Raises ValueError if the person refuses or gives no name. Prefect fails the flow if nobody answers within `hours`.
    """
    answer = pause_flow_run(wait_for_input=Approval.with_initial_data(
        description=f"Shall {case} become champion?", approve=False, name=""), timeout=round(hours * 3600))
    if not answer.approve:
        raise ValueError(f"{answer.name or 'a person without a name'} did not approve the promotion: "
                         f"{answer.reason or 'no reason given'}")
    if not answer.name.strip():
        raise ValueError("the approval form must contain the name of the person, got none: start the promotion again")
    return f"{tasks.author()}, approved by {answer.name.strip()}"


def _slot() -> AbstractContextManager[Any]:
    """Return a context manager: inside its `with` block, no other flow changes aliases of a shared registry.

    It does nothing for a registry on this machine, because `registry.sole_writer` locks such a registry.
    """
    return concurrency(SLOT, strict=True) if registry.shared() else nullcontext()


if __name__ == "__main__":
    sys.exit("onediff: this module contains flows for deployments; use 'onediff registry promote [VERSION]'")
