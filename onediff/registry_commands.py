"""`onediff registry ...`: versions of the model and who is champion. Thin, like cli.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

TRAINED = Path("data/models/tune")

app = typer.Typer(help="Versions of the model: list, register, promote, rollback.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")]


@app.command("list")
def list_versions(as_json: Json = False) -> None:
    """Every version, newest first, with its aliases and gate scores."""
    from onediff import registry

    rows = registry.list_versions()
    _print(rows, "\n".join(_version_text(row) for row in rows) or "no version yet: 'make run' registers one", as_json)


@app.command()
def register(model: Annotated[Path, typer.Option(help="The model folder.")] = TRAINED) -> None:
    """Make the trained model a version and the candidate; the same weights stay the same version."""
    from onediff import registry

    version = registry.register(model, Path("data/metrics.json"), Path("data/gate.json"), Path("data/scored"))
    typer.echo(f"version {version} is the candidate")


@app.command()
def promote(version: Annotated[str | None, typer.Argument(help="Default: the candidate.")] = None) -> None:
    """Make a version champion if mlflow/promotion.yaml lets it."""
    from onediff import registry

    verdict = registry.promote(version)
    if not verdict.promoted:
        raise ValueError("\n  ".join([f"version {verdict.version} is refused:", *verdict.reasons]))
    was = f"; version {verdict.replaced} was" if verdict.replaced else ""
    typer.echo(f"version {verdict.version} is champion{was}")


@app.command()
def rollback() -> None:
    """Make the previous champion champion again."""
    from onediff import registry

    typer.echo(f"version {registry.rollback()} is champion again")


def _version_text(row: dict[str, Any]) -> str:
    scores = "  ".join(f"{name} {value:.3f}" for name, value in row["scores"].items())
    why = row["history"].get("refused_because") or row["history"].get("reason") or ""
    return "\n  ".join([f"version {row['version']}  {', '.join(row['aliases']) or '-'}  {row['created']}  "
                        f"weights {row['weights_digest'][:12]}", *filter(None, [scores, why])])


def _print(values: Any, text: str, as_json: bool) -> None:
    typer.echo(json.dumps(values, ensure_ascii=False) if as_json else text)
