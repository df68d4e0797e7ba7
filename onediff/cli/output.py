"""The only code that prints the results of commands, and the options that several commands share."""

import json
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="JSON instead of text.")]
Model = Annotated[str, typer.Option(help="A model folder, or an MLflow address such as models:/onediff/3.")]


def print_text(text: object) -> None:
    typer.echo(text)


def print_result(result: Any, text: str, as_json: bool) -> None:
    """Prints the result as one line of JSON, or as text for people."""
    print_text(json.dumps(result, ensure_ascii=False) if as_json else text)
