"""`python -m flows.evaluate [MODEL]` captions and scores a registered version again, for example after new metrics."""

import sys
from typing import Any

from prefect import State, flow
from prefect.states import Completed, Failed

from flows import command
from flows.names import dated_name
from flows.notify import publish_scores
from flows.processes import pipeline_lock
from flows.tasks import rescore, score_again
from onediff import paths, registry


@flow(name="evaluate", flow_run_name=dated_name)
def evaluate(model: str = paths.CHAMPION) -> State[Any]:
    """Caption data/diffcap with a registered model version again, and write the new scores into that version.

    `model` is models:/onediff@ALIAS or models:/onediff/VERSION.
    """
    try:
        with pipeline_lock():
            # The alias is resolved to a version number only once, because it may move to another version meanwhile.
            version = registry.version_tags(model)["version"]
            evidence = score_again(f"models:/{registry.NAME}/{version}")
            print(publish_scores(evidence.root / paths.METRICS, "scores-again"))
            rescore(version, evidence)
            return Completed(message=f"version {version} has its new scores")
    except (ValueError, OSError) as error:
        return Failed(message=str(error))


if __name__ == "__main__":
    print(command.run(evaluate, *sys.argv[1:2], lock=pipeline_lock()).message)
