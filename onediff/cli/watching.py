"""`onediff drift`: whether use still looks like training. Thin, like cli.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

CHAMPION = "models:/onediff@champion"

app = typer.Typer()

Json = Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")]
Model = Annotated[str, typer.Option(help="A model folder, or an MLflow address such as models:/onediff/3.")]


@app.command()
def drift(days: Annotated[float, typer.Option(min=0, help="How far back the usage log is read.")] = 7,
          model: Model = CHAMPION,
          profile: Annotated[Path | None, typer.Option(help="Default: what was registered with the model.")] = None,
          as_json: Json = False) -> None:
    """Hold recent captions of the usage log against training; exit code 1 if they drifted. See docs/watching.md."""
    from onediff.ops.drift import as_text, examine

    found = examine(days=days, model=model, profile=profile)
    typer.echo(json.dumps(found.as_dict()) if as_json else as_text(found))
    if found.moved:
        raise typer.Exit(1)


@app.command()
def profile(out: Path, model: Model = CHAMPION) -> None:
    """Measure what `onediff drift` compares with, on split gate, into OUT/profile.json."""
    from onediff.config import load_params
    from onediff.ops.drift import write_profile
    from onediff.ops.predict import folder_of

    settings = load_params().drift
    if settings is None:
        raise ValueError("params.yaml: drift: missing; copy it from presets/tiny.yaml")
    typer.echo(write_profile(out, folder_of(model), num_pairs=settings.num_pairs))
