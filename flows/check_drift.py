"""`python -m flows.check_drift`: hold recent captions against training, tell what moved, and retrain if wanted."""

from __future__ import annotations

import base64
import io
import sys
from datetime import UTC, datetime
from typing import Any

from prefect import flow, task
from prefect.artifacts import create_image_artifact, create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from flows import command
from flows.notify import tell, without_secrets
from flows.start import start_retraining
from onediff.ops.drift import Drift, as_text, examine


@flow(name="check-drift")
def check_drift(days: float = 7, then_retrain: bool = False) -> State[Any]:
    """The champion's use in the last days; Drifted, Steady, or NoVerdict where too little was noted.

    `then_retrain`: what drifted starts a retraining.
    """
    try:
        found = measure_drift(days)
    except (ValueError, OSError) as error:
        return Failed(message=without_secrets(str(error)))
    create_markdown_artifact(as_text(found), key="drift-figures", description=found.verdict)
    if found.figures:
        image = base64.b64encode(picture(*found.confidences)).decode()
        create_image_artifact(f"data:image/png;base64,{image}", key="drift-confidence", description=found.verdict)
    if found.moved:
        started = start_retraining(f"drift-{datetime.now(UTC):%Y-%m-%d}") if then_retrain else ""
        tell("drift", f"Use moved away from training: {', '.join(found.moved)}",
             why="\n".join([*found.notes, *filter(None, [started])]) or "docs/watching.md says what each figure means.",
             then=f"onediff drift --days {days:g}", table=as_text(found))
    name = "Drifted" if found.moved else "Steady" if found.figures else "NoVerdict"
    return Completed(name=name, message="; ".join([found.verdict, *found.notes]))


@task(cache_policy=NO_CACHE)
def measure_drift(days: float) -> Drift:
    return examine(days=days)


def picture(then: list[float], now: list[float]) -> bytes:
    """Confidence of captions at training time and in use, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    for values, label in ((then, "at training time"), (now, "in use")):
        axes.hist(values, bins=20, range=(0, 1), density=True, alpha=0.5, label=label)
    axes.set_xlabel("confidence")
    axes.set_ylabel("density")
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=80)
    return buffer.getvalue()


def main() -> None:
    state = command.run(check_drift, *map(float, sys.argv[1:2]))
    if not state.is_completed():
        sys.exit(f"onediff: {state.message}")
    print(f"{state.name}: {state.message}")


if __name__ == "__main__":
    main()
