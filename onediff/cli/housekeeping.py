"""`onediff gc`: thin."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from onediff.ops.housekeeping import Survey

SHOWN = 5  # of each kind, by name

app = typer.Typer()


@app.command()
def gc(yes: Annotated[bool, typer.Option("--yes", help="Remove it; without, it is only shown.")] = False,
       days: Annotated[float, typer.Option(min=0, help="What is younger stays.")] = 30,
       as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")] = False) -> None:
    """Remove what is old and no registered version needs: cached data, runs, branches, checkpoints, copies."""
    from flows.processes import pipeline_lock
    from onediff.ops.housekeeping import survey, sweep

    with pipeline_lock() if yes else nullcontext():
        found = survey(days)
        left = sweep(found) if yes else []
    said = "nothing to remove" if not found.items else (
        "removed" if yes else "nothing was removed: 'make gc YES=1' or 'onediff gc --yes' does it")
    if left:
        said += f"\n{_purge(left)}"
    lines = [*_lines(found), *(f"!! {line}" for line in found.refused), said]
    typer.echo(json.dumps({**asdict(found), "removed": yes}) if as_json else "\n".join(lines))


def _purge(runs: list[str]) -> str:
    """A server that this machine keeps loses them for good; of another one, its machine must do it."""
    from flows.services import databases, topology
    from onediff import tracking
    from onediff.config import load_runtime

    stack = topology.load_stack(load_runtime())
    if tracking.uri().rstrip("/") == stack.mlflow:
        return databases.purge(stack, runs)
    return f"the MLflow server keeps {len(runs)} runs as deleted; how they go for good: deploy/README.md"


def _lines(found: Survey) -> list[str]:
    from onediff.ops.housekeeping import KINDS

    sizes: Counter[str] = Counter()
    for item in found.items:
        sizes[item.kind] += item.num_bytes
    lines = []
    for kind, what in KINDS.items():
        names = found.names(kind)
        if names:
            lines.append(f"{len(names)} {kind}, {sizes[kind] / 2**20:.1f} MB: {what}")
            lines += [f"  {name}" for name in names[:SHOWN]]
            lines += [f"  and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
    return lines
