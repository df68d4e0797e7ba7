"""`onediff data ...`: what there is, what is missing, what it costs, how it looks. Thin, like cli.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

GALLERY = Path(".onediff/gallery")

app = typer.Typer(help="Sources of pairs: status, fetch, read, dry-run, browse.", no_args_is_help=True)

Stage = Literal["write", "instruct"]
Json = Annotated[bool, typer.Option("--json", help="JSON instead of text.")]


@app.command()
def status(as_json: Json = False) -> None:
    """Each source: what it is, licence, where it comes from, size, what is there, what is missing, what to do."""
    from onediff.config import load_params
    from onediff.data.sources import status as sources

    rows = sources.status(load_params() if Path("params.yaml").exists() else None)
    _print(rows, sources.as_text(rows), as_json)


@app.command()
def fetch(source: str) -> None:
    """Bring in what has a direct address by `dvc import-url`; say what to put where of the rest."""
    from onediff.data.sources.tracked import fetch as bring

    bring(source)


@app.command()
def read(source: str, folder: Path, as_json: Json = False) -> None:
    """Read a folder as published and count, per split: records, pairs, references, empty sentences, missing images."""
    from onediff.data.sources.read import as_text, summarize

    summary = summarize(source, folder)
    _print(summary, as_text(summary), as_json)


@app.command("dry-run")
def dry_run(source: str, stage: Annotated[Stage, typer.Option(help="Captions, or edit instructions.")] = "write",
            as_json: Json = False) -> None:
    """The exact requests to the writer and what they would cost; nothing is asked. `dvc repro write@SOURCE` asks."""
    from onediff.config import load_params, load_runtime
    from onediff.data.writer.dry_run import as_text, plan

    planned = plan(source, load_params(), load_runtime(), stage=stage)
    _print(planned, as_text(planned), as_json)


@app.command()
def browse(folder: Annotated[Path, typer.Option(help="Folder of shards.")] = Path("data/diffcap"),
           per_group: Annotated[int, typer.Option(help="Pairs of each source, split and type.")] = 12) -> None:
    """A page with pairs and captions: filters by source, split and type, and a search."""
    from onediff.data.browse import browse as write_page

    typer.echo(write_page(folder, GALLERY, per_group=per_group))


def _print(values: Any, text: str, as_json: bool) -> None:
    typer.echo(json.dumps(values, ensure_ascii=False) if as_json else text)
