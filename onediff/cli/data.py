"""The commands `onediff data ...`, which inspect, fetch and read the sources of image pairs."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from onediff.cli.output import SETTINGS, GroupedCommands, Json, path_argument, path_option, print_result, print_text
from onediff.paths import DIFFCAP, PARAMS

GALLERY = Path(".onediff/gallery")

app = typer.Typer(cls=GroupedCommands, help="Inspect, fetch and read the sources of image pairs.",
                  no_args_is_help=True, context_settings=SETTINGS)

Source = Annotated[str, typer.Argument(help="The name of a source, such as spot_the_diff. 'onediff data status' lists "
                                       "all names.")]


@app.command()
def status(as_json: Json = False) -> None:
    """Show licence, size, missing files and the next step of each data source.

    Example: onediff data status
    """
    from onediff.config import load_params
    from onediff.data.sources import status as sources

    rows = sources.status(load_params() if PARAMS.exists() else None)
    print_result(rows, sources.as_text(rows), as_json)


@app.command()
def fetch(source: Source) -> None:
    """Download a data source, or print where to get it.

    The command downloads files that have a direct address with 'dvc import-url'. For all other files, it prints where
    to get them and in which folder to put them.

    Example: onediff data fetch spot_the_diff
    """
    from onediff.data.sources.tracked import fetch as fetch_source

    fetch_source(source)


@app.command()
def read(source: Annotated[str, typer.Argument(help="The published set that the folder contains, or any name for "
                                               "your own pairs.")],
         folder: Annotated[Path, path_argument("The folder as its authors publish it, or with your pairs.csv.")],
         as_json: Json = False) -> None:
    """Count the image pairs in a dataset folder and decode every image.

    For each split, the command prints the number of records, pairs, reference captions, empty captions and missing
    images. It also lists every damaged image, and every image with metadata that cannot be used. Nothing is written.

    Example: onediff data read mine examples/folder
    """
    from onediff.data.sources.decoding import check_images
    from onediff.data.sources.read import as_text, summarize

    summary = summarize(source, folder) | check_images(source, folder)
    print_result(summary, as_text(summary), as_json)


@app.command("dry-run")
def dry_run(source: Annotated[str, typer.Argument(help="A source that data.written of params.yaml lists; with --stage "
                                                  "instruct, a source in data.diffused.")],
            stage: Annotated[Literal["write", "instruct"], typer.Option(
                help="The DVC stage: 'write' makes captions, 'instruct' makes edit instructions.")] = "write",
            as_json: Json = False) -> None:
    """Print the requests that a stage would send to the language model, and their cost.

    Nothing is sent. 'dvc repro write@SOURCE' sends the requests, or 'dvc repro instruct@SOURCE' with --stage instruct.
    The requests need the pairs of the source in data/pairs, or the images in data/raw with --stage instruct. The
    example needs the preset paper, which lists the source coco.

    Example: onediff data dry-run coco
    """
    from onediff.config import load_params, load_runtime
    from onediff.data.writer.dry_run import as_text, plan

    planned = plan(source, load_params(), load_runtime(), stage=stage)
    print_result(planned, as_text(planned), as_json)


@app.command()
def browse(folder: Annotated[Path, path_option("--folder", help="The folder of shards to show.")] = DIFFCAP,
           per_group: Annotated[int, typer.Option(
               min=1, help="The number of pairs of each combination of source, split and change type.")] = 12) -> None:
    """Write a web page that shows image pairs with their captions.

    The page has a search field, and filters for source, split and change type. The command prints the path of the
    page.

    Example: onediff data browse --per-group 30
    """
    from onediff.data.browse import browse as write_page

    print_text(write_page(folder, GALLERY, per_group=per_group))
