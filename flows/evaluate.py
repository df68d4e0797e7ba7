"""`python -m flows.evaluate [MODEL]`: caption and score a registered version again, as after a change in scoring."""

from __future__ import annotations

import sys
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from flows import command
from flows.processes import alone
from flows.tasks import keep_rescored, publish_scores, score_again
from onediff import registry


@flow(name="evaluate")
def evaluate(model: str = "models:/onediff@champion") -> State[Any]:
    """Scores models:/onediff@ALIAS or models:/onediff/VERSION on data/diffcap; the pipeline's own results stay."""
    try:
        with alone():
            version = registry.version_tags(model)["version"]  # once: an alias may move while the version is scored
            evidence = score_again(f"models:/{registry.NAME}/{version}")
            print(publish_scores(evidence.root / "data/metrics.json", "scores-again"))
            keep_rescored(version, evidence)
            return Completed(message=f"version {version} has its new scores")
    except (ValueError, OSError) as error:
        return Failed(message=str(error))


def main() -> None:
    state = command.run(evaluate, *sys.argv[1:2], first=alone())
    if not state.is_completed():
        sys.exit(f"onediff: {state.message}")
    print(state.message)


if __name__ == "__main__":
    main()
