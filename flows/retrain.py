"""`python -m flows.retrain`: the stages of dvc.yaml in order, then registering and promotion."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from flows.processes import alone, prepare
from flows.tasks import keep_scores, promote, publish_scores, register, repro, stages, stale_stages
from onediff.config import load_params

if TYPE_CHECKING:
    from onediff.tracking import Run


@flow(name="retrain")
def retrain() -> State[Any]:
    """Runs what is out of date, in order; a stage that fails ends the flow with its message."""
    try:
        with alone():
            return _retrain()
    except (ValueError, OSError) as error:  # told in one line; Prefect would print the whole stack
        return Failed(message=str(error))


def _retrain() -> State[Any]:
    stale = stale_stages()
    with _parent_run() if stale else nullcontext() as run:
        ran = False
        for stage in stages(load_params().data):
            state = repro(stage, ask=ran or stage in stale, return_state=True)
            if not state.is_completed():
                if run:
                    run.fail(str(state.message))
                return Failed(message=state.message)
            ran = ran or state.name != "UpToDate"
        print(publish_scores(Path("data/metrics.json"), "scores"))
        keep_scores()
        register()
        verdict = promote()  # the candidate, whichever it is: naming a version would undo a rollback
    return Completed(name="Ran" if ran else "UpToDate", message=f"version {verdict.version} is "
                     + ("champion" if verdict.promoted else "refused: " + "; ".join(verdict.reasons)))


@contextmanager
def _parent_run() -> Iterator[Run]:
    """The MLflow run that those of the phases and of the evaluation nest under."""
    from onediff.tracking import parent_run

    with parent_run("retrain", load_params()) as run:
        yield run


def main() -> None:
    prepare()
    state = retrain(return_state=True)
    if not state.is_completed():
        sys.exit(f"onediff: {state.message}")


if __name__ == "__main__":
    main()
