"""Report events and scores of the flows as Prefect artifacts, and through the notification blocks of runtime.yaml."""

import re
from pathlib import Path
from typing import Any, Literal

import prefect.blocks.notifications  # noqa: F401 - the import registers Prefect's types of notification blocks
from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.blocks.abstract import NotificationBlock
from prefect.blocks.core import Block
from prefect.cache_policies import NO_CACHE

from onediff.config import load_runtime
from onediff.eval.metrics.catalog import BEHAVIOUR, BEHAVIOUR_HEADLINES, CAPTION_HEADLINES
from onediff.files import read_json

Event = Literal["failure", "refusal", "promotion", "rollback", "drift", "data"]


def notify(event: Event, what: str, *, why: str, then: str, table: str = "") -> None:
    """Publish an event as a Prefect artifact, and send it through the notification blocks of runtime.yaml.

    `what` says what happened, `why` gives the reason, `then` is the next command to type, and `table` holds details in
    Markdown. A notification that cannot be sent is reported in the output and raises no error.
    """
    what, why = without_secrets(what), without_secrets(why)
    text = f"**{what}**\n\n{why}\n\nNext: `{then}`\n" + (f"\n{without_secrets(table)}\n" if table else "")
    create_markdown_artifact(text, key=event, description=what)
    for slug in load_runtime().notify:
        try:
            block = Block.load(slug)
            if not isinstance(block, NotificationBlock):
                raise ValueError(f"is a {type(block).__name__}, which cannot send notifications")
            send: Any = block.notify  # The type is Any, because inside an event loop the method returns a coroutine.
            send(body=f"{what}\n{why}\nNext: {then}\n", subject=f"OneDiff: {what}")
        except Exception as error:  # noqa: BLE001 - a service may raise any error, and it may contain a secret address
            problem = " ".join(str(error).split()) if isinstance(error, ValueError) else type(error).__name__
            print(f"runtime.yaml: notify: {slug} was not notified: {without_secrets(problem)}")


def without_secrets(text: str) -> str:
    """Return the text with *** in place of the user and password in every URL."""
    return re.sub(r"(?<=//)[^/@\s]+(?=@)", "***", text)


@task(cache_policy=NO_CACHE)
def publish_scores(scores: Path, key: str) -> str:
    """Publish the scores in the JSON file `scores` as a Prefect artifact, and return them as a Markdown table."""
    table = score_table(read_json(scores))
    create_markdown_artifact(table, key=key, description=f"Scores in {scores}")
    return table


def score_table(metrics: dict[str, Any]) -> str:
    """Return two Markdown tables, for caption scores and for behaviour scores, at most 100 characters wide.

    A benchmark has one row for the model, followed by one row for each trivial baseline with scores in the table.
    """
    captions = {"num_pairs": "pairs", **{name: name for name in CAPTION_HEADLINES}}
    behaviour = {name: BEHAVIOUR[name].label for name in BEHAVIOUR_HEADLINES}
    return "\n\n".join(filter(None, (_table(metrics, captions), _table(metrics, behaviour))))


def _table(metrics: dict[str, Any], labels: dict[str, str]) -> str:
    columns = [name for name in labels if any(name in scores for scores in metrics.values())]
    rows = [["", *(labels[name] for name in columns)]]
    for benchmark, scores in metrics.items():
        if any(name in scores for name in columns):
            rows.append([benchmark, *_cells(scores, columns)])
        rows += [[f"baseline: {name}", *_cells(values, columns)] for name, values in scores.get("floor", {}).items()
                 if any(column in values for column in columns)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in padded]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]]) if columns else ""


def _cells(scores: dict[str, Any], columns: list[str]) -> list[str]:
    values = [scores.get(name) for name in columns]
    return [str(value) if isinstance(value, int) else f"{value:.3f}" if isinstance(value, float) else ""
            for value in values]
