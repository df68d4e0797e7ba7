"""`onediff doctor`, `drift`, `profile` and `gc`: keep a project that is in use in order."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from onediff.cli.captioning import Model
from onediff.cli.output import Json, print_result, print_text
from onediff.paths import CHAMPION

if TYPE_CHECKING:
    from onediff.ops.housekeeping import Survey

SHOWN = 5  # names of each kind


def doctor(as_json: Json = False) -> None:
    """What is installed, which device, which parts are ready, what to do next."""
    from onediff.ops.doctor import examine

    findings = examine()
    text = "\n".join(f"{'ok' if item.ok else '--'}  {item.name:<10} {item.found}"
                     + ("" if item.ok else f"\n      -> {item.cure}") for item in findings)
    print_result([asdict(item) for item in findings], text, as_json)
    if any(item.needed and not item.ok for item in findings):
        raise typer.Exit(1)


def drift(days: Annotated[float, typer.Option(min=0, help="How far back the usage log is read.")] = 7,
          model: Model = CHAMPION,
          profile: Annotated[Path | None, typer.Option(help="Default: what was registered with the model.")] = None,
          as_json: Json = False) -> None:
    """Hold recent captions of the usage log against training; exit code 1 if they drifted. See docs/watching.md."""
    from onediff.ops.drift import as_text, examine

    result = examine(days=days, model=model, profile=profile)
    print_result(result.as_dict(), as_text(result), as_json)
    if result.moved:
        raise typer.Exit(1)


def profile(out: Path, model: Model = CHAMPION) -> None:
    """Measure what `onediff drift` compares with, on split gate, into OUT/profile.json."""
    from onediff.ops.drift import load_settings, write_profile
    from onediff.ops.predict import folder_of

    print_text(write_profile(out, folder_of(model), num_pairs=load_settings().num_pairs))


def gc(yes: Annotated[bool, typer.Option("--yes", help="Remove it; without, it is only shown.")] = False,
       days: Annotated[float, typer.Option(min=0, help="What is younger stays.")] = 30,
       as_json: Json = False) -> None:
    """Remove what is old and no registered version needs: cached data, runs, branches, checkpoints, copies."""
    from flows.processes import alone
    from onediff.ops.housekeeping import survey, sweep

    with alone() if yes else nullcontext():
        surveyed = survey(days)
        deleted_runs = sweep(surveyed) if yes else []
    message = "nothing to remove" if not surveyed.items else (
        "removed" if yes else "nothing was removed: 'make gc YES=1' or 'onediff gc --yes' does it")
    lines = [*_item_lines(surveyed), *(f"!! {line}" for line in surveyed.refused), message]
    if deleted_runs:
        lines.append(_purge(deleted_runs))
    print_result({**asdict(surveyed), "removed": yes}, "\n".join(lines), as_json)


def _item_lines(surveyed: Survey) -> list[str]:
    from onediff.ops.housekeeping import KINDS

    lines = []
    for kind, description in KINDS.items():
        items = [item for item in surveyed.items if item.kind == kind]
        if items:
            num_bytes = sum(item.num_bytes for item in items)
            lines.append(f"{len(items)} {kind}, {num_bytes / 2**20:.1f} MB: {description}")
            lines += [f"  {item.name}" for item in items[:SHOWN]]
            lines += [f"  and {len(items) - SHOWN} more"] if len(items) > SHOWN else []
    return lines


def _purge(runs: list[str]) -> str:
    """Deletes runs for good on a server of this machine. On another server, an administrator there must do it."""
    from flows.services import databases
    from flows.services import topology as plan
    from onediff import tracking
    from onediff.config import load_runtime

    where = plan.place(load_runtime())
    if tracking.uri().rstrip("/") == where.mlflow:
        return databases.purge(where, runs)
    return f"the MLflow server keeps {len(runs)} runs as deleted; how they go for good: deploy/README.md"
