"""`python -m flows.refresh_data`: what changed elsewhere and what was dropped here becomes raw data under DVC."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from flows import command
from flows.notify import tell, without_secrets
from flows.processes import alone
from flows.start import start_retraining
from onediff.config import load_params, load_runtime
from onediff.data.sources import tracked
from onediff.data.sources.inbox import Inbox, InboxReport, import_batches

RETRAIN = "prefect deployment run retrain/retrain"


@flow(name="refresh-data")
def refresh_data(settle_s: float = 60, then_retrain: bool = False) -> State[Any]:
    """Updates imported sources and takes batches in whose files did not change for `settle_s`; Changed or Unchanged.

    What cannot be had or read is told and stops nothing else. `then_retrain`: what changed starts a retraining.
    """
    try:
        with alone():
            changed, problems = update_sources()
            taken = take_batches(settle_s)
    except (ValueError, OSError) as error:
        return Failed(message=without_secrets(str(error)))
    changed += [f"{source}: {number} pairs came in" for source, number in taken.batches]
    problems += [without_secrets(problem) for problem in taken.problems]
    started = start_retraining(f"data-{tracked.state()}") if changed and then_retrain else ""
    _tell(changed, problems, started)
    if problems and not changed:
        return Failed(message="; ".join(problems))
    notes = [*changed, *problems, *(f"{name}: still changing" for name in taken.waiting), *filter(None, [started])]
    return Completed(name="Changed" if changed else "Unchanged", message="; ".join(notes) or "nothing is new")


@task(cache_policy=NO_CACHE)
def update_sources() -> tuple[list[str], list[str]]:
    """What changed, and what could not be had, of everything that `onediff data fetch` or `dvc import` brought."""
    changed, problems = [], []
    for path in tracked.imported():
        try:
            if tracked.update(path):
                changed.append(f"{path.with_suffix('')}: new at its origin")
        except ValueError as error:
            problems.append(without_secrets(str(error)))
    return changed, problems


@task(cache_policy=NO_CACHE)
def take_batches(settle_s: float) -> InboxReport:
    """Every whole batch of runtime.yaml's inbox; none where there is no inbox."""
    runtime, data = load_runtime(), load_params().data
    if runtime.inbox is None:
        return InboxReport()
    return import_batches(Inbox(Path(runtime.inbox), Path(runtime.scratch), data.raw, settle_s, data.max_megapixels))


def _tell(changed: list[str], problems: list[str], started: str) -> None:
    if changed:
        tell("data", "Raw data changed", why="\n".join([*changed, *filter(None, [started])]),
             then="git diff data/raw" if started else RETRAIN)
    if problems:
        tell("failure", "Some raw data could not be refreshed", why="\n".join(problems), then="onediff data status")


def main() -> None:
    state = command.run(refresh_data, first=alone())
    if not state.is_completed():
        sys.exit(f"onediff: {state.message}")
    print(f"{state.name}: {state.message}")


if __name__ == "__main__":
    main()
