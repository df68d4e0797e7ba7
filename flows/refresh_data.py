"""`python -m flows.refresh_data` adds updates of imported sources and new batches of the inbox to the raw data."""

from pathlib import Path
from typing import Any

from prefect import State, flow, task
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed, Failed

from flows import command, deployments
from flows.names import dated_name
from flows.notify import notify, without_secrets
from flows.processes import pipeline_lock
from onediff.config import load_params, load_runtime
from onediff.data.sources import tracked
from onediff.data.sources.inbox import Inbox, InboxReport, import_batches


@flow(name="refresh-data", flow_run_name=dated_name)
def refresh_data(settle_s: float = 60, then_retrain: bool = False) -> State[Any]:
    """Update imported data sources, and import the batches of new pairs in the inbox folder.

    A batch is imported when its files did not change for `settle_s` seconds. A source or batch that cannot be read is
    reported, and the flow continues with the next one. If `then_retrain` is true, a change starts a retraining. The
    returned Prefect state has the name Changed or Unchanged.
    """
    try:
        with pipeline_lock():
            changed, problems = update_sources()
            batches = take_batches(settle_s)
    except (ValueError, OSError) as error:
        return Failed(message=without_secrets(str(error)))
    changed += [f"{source}: {number} pairs imported" for source, number in batches.batches]
    problems += [without_secrets(problem) for problem in batches.problems]
    started = []
    if changed:
        started = [deployments.start_retraining(f"data-{tracked.state()}")] if then_retrain else []
        notify("data", "Raw data changed", why="\n".join(changed + started),
               then="git diff data/raw" if started else deployments.RETRAIN_COMMAND)
    if problems:
        notify("failure", "Some raw data could not be refreshed", why="\n".join(problems), then="onediff data status")
    if problems and not changed:
        return Failed(message="; ".join(problems))
    notes = [*changed, *problems, *(f"{name}: still changing" for name in batches.waiting), *started]
    return Completed(name="Changed" if changed else "Unchanged", message="; ".join(notes) or "nothing is new")


@task(cache_policy=NO_CACHE)
def update_sources() -> tuple[list[str], list[str]]:
    """Update the data that `onediff data fetch` or `dvc import` imported.

    Return two lists of texts: the changes, and the problems of sources that could not be updated.
    """
    changed, problems = [], []
    for path in tracked.imported():
        try:
            if tracked.update(path):
                changed.append(f"{path.with_suffix('')}: updated from its origin")
        except ValueError as error:
            problems.append(without_secrets(str(error)))
    return changed, problems


@task(cache_policy=NO_CACHE)
def take_batches(settle_s: float) -> InboxReport:
    """Import every complete batch of new pairs from the inbox folder in runtime.yaml; do nothing if no inbox is set."""
    runtime, data = load_runtime(), load_params().data
    if runtime.inbox is None:
        return InboxReport()
    return import_batches(Inbox(Path(runtime.inbox), Path(runtime.scratch), data.raw, settle_s, data.max_megapixels))


if __name__ == "__main__":
    state = command.run(refresh_data, lock=pipeline_lock())
    print(f"{state.name}: {state.message}")
