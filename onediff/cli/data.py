"""`onediff data ...`: the sources of pairs, what is missing of them, what the writer would cost, a page of pairs."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from onediff.cli.output import Json, print_result, print_text
from onediff.paths import DIFFCAP, PARAMS

GALLERY = Path(".onediff/gallery")

app = typer.Typer(help="Sources of pairs: status, fetch, read, dry-run, browse.", no_args_is_help=True)


@app.command()
def status(as_json: Json = False) -> None:
    """Each source: what it is, licence, where it comes from, size, what is there, what is missing, what to do."""
    from onediff.config import load_params
    from onediff.data.sources import status as sources

    rows = sources.status(load_params() if PARAMS.exists() else None)
    print_result(rows, sources.as_text(rows), as_json)


@app.command()
def fetch(source: str) -> None:
    """Bring in what has a direct address by `dvc import-url`; say what to put where of the rest."""
    from onediff.data.sources.tracked import fetch as bring

    bring(source)


@app.command()
def read(source: str, folder: Path, as_json: Json = False) -> None:
    """Read a folder as published and count, per split: records, pairs, references, empty sentences, missing images."""
    from onediff.data.sources.decoding import broken_images
    from onediff.data.sources.read import as_text, summarize

    summary = summarize(source, folder) | {"broken": broken_images(source, folder)}
    print_result(summary, as_text(summary), as_json)


@app.command("dry-run")
def dry_run(source: str,
            stage: Annotated[Literal["write", "instruct"], typer.Option(
                help="Captions, or edit instructions.")] = "write",
            as_json: Json = False) -> None:
    """The exact requests to the writer and what they would cost; nothing is asked. `dvc repro write@SOURCE` asks."""
    from onediff.config import load_params, load_runtime
    from onediff.data.writer.dry_run import as_text, plan

    planned = plan(source, load_params(), load_runtime(), stage=stage)
    print_result(planned, as_text(planned), as_json)


@app.command()
def browse(folder: Annotated[Path, typer.Option(help="Folder of shards.")] = DIFFCAP,
           per_group: Annotated[int, typer.Option(help="Pairs of each source, split and type.")] = 12) -> None:
    """A page with pairs and captions: filters by source, split and type, and a search."""
    from onediff.data.browse import browse as write_page

    print_text(write_page(folder, GALLERY, per_group=per_group))
