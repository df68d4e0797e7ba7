"""`python -m flows.check_drift` compares recent captions with training and reports drift; it can start a retraining."""

import base64
import io
import sys
from datetime import UTC, datetime
from typing import Any

from matplotlib.figure import Figure
from prefect import State, flow
from prefect.artifacts import create_image_artifact, create_markdown_artifact
from prefect.states import Completed, Failed

from flows import command
from flows.deployments import start_retraining
from flows.names import dated_name
from flows.notify import notify, without_secrets
from onediff.ops.drift import as_text, examine


@flow(name="check-drift", flow_run_name=dated_name)
def check_drift(days: float = 7, then_retrain: bool = False) -> State[Any]:
    """Check whether the champion model's captions of the last `days` days differ from its captions at registration.

    The returned Prefect state has the name Drifted, Steady, or NoVerdict if the usage log has too few captions. If
    `then_retrain` is true, drift starts a retraining.
    """
    try:
        drift = examine(days=days)
    except (ValueError, OSError) as error:
        return Failed(message=without_secrets(str(error)))
    create_markdown_artifact(as_text(drift), key="drift-figures", description=drift.verdict)
    if drift.figures:
        image = base64.b64encode(picture(*drift.confidences)).decode()
        create_image_artifact(f"data:image/png;base64,{image}", key="drift-confidence", description=drift.verdict)
    if drift.moved:
        started = [start_retraining(f"drift-{datetime.now(UTC):%Y-%m-%d}")] if then_retrain else []
        notify("drift", f"Recent captions differ from training: {', '.join(drift.moved)}",
               why="\n".join([*drift.notes, *started]) or "docs/watching.md explains each figure.",
               then=f"onediff drift --days {days:g}", table=as_text(drift))
    name = "Drifted" if drift.moved else "Steady" if drift.figures else "NoVerdict"
    return Completed(name=name, message="; ".join([drift.verdict, *drift.notes]))


def picture(then: list[float], now: list[float]) -> bytes:
    """Return a PNG image with two histograms of the captions' confidence: at training time, and in recent use."""
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    for values, label in ((then, "at training time"), (now, "in use")):
        axes.hist(values, bins=20, range=(0, 1), density=True, alpha=0.5, label=label)
    axes.set(xlabel="confidence", ylabel="density")
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=80)
    return buffer.getvalue()


if __name__ == "__main__":
    state = command.run(check_drift, *map(float, sys.argv[1:2]))
    print(f"{state.name}: {state.message}")
