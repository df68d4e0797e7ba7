"""`onediff registry ...`: versions of the model and who is champion. Thin, like cli.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from onediff.paths import TRAINED

app = typer.Typer(help="Versions of the model: list, register, promote, rollback, trail.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")]
Why = Annotated[str | None, typer.Option(help="For the trail.")]


@app.command("list")
def list_versions(as_json: Json = False) -> None:
    """Every version, newest first, with its aliases and gate scores."""
    from onediff import registry

    rows = registry.list_versions()
    _print(rows, "\n".join(_version_text(row) for row in rows) or "no version yet: 'make run' registers one", as_json)


@app.command()
def register(model: Annotated[Path, typer.Option(help="The model folder.")] = TRAINED) -> None:
    """Make the trained model a version and the candidate; the same model folder stays the same version."""
    from onediff import registry
    from onediff.ops import candidate as registering

    version = registering.register(model)
    if registry.shared():
        typer.echo(f"version {version}; 'onediff registry promote {version}' submits it to the deployment")
    else:
        typer.echo(f"version {version} is the candidate")


@app.command()
def promote(version: Annotated[str | None, typer.Argument(help="Default: the candidate.")] = None,
            why: Why = None) -> None:
    """Make a version champion if mlflow/promotion.yaml lets it. On a shared server the deployment `promote` does it."""
    from onediff import registry

    if registry.shared():
        from flows import deployments

        typer.echo(deployments.submit(deployments.PROMOTE, version=version, why=why))
        return
    approved = None
    if registry.load_rules().approval_h and (opinion := registry.assess(version)).promoted and not opinion.reasons:
        approved = opinion.case
        typer.confirm(f"Shall {approved} become champion?", abort=True)
    verdict = registry.promote(version, why=why, approved=approved)
    if not verdict.promoted:
        raise ValueError("\n  ".join([f"version {verdict.version} is refused:", *verdict.reasons]))
    was = f"; version {verdict.replaced} was" if verdict.replaced else ""
    typer.echo(f"version {verdict.version} is champion{was}")


@app.command()
def rollback(why: Why = None) -> None:
    """Make the previous champion champion again. On a shared server the deployment `rollback` does it."""
    from onediff import registry

    if registry.shared():
        from flows import deployments

        typer.echo(deployments.submit(deployments.ROLLBACK, why=why))
        return
    typer.echo(f"version {registry.rollback(why=why)} is champion again")


@app.command()
def trail(as_json: Json = False) -> None:
    """Every change of candidate, champion and previous, by number; and whether MLflow's aliases are as it says."""
    from onediff import registry

    changes = registry.trail()
    lines = [str(change) for change in changes] or ["no change yet"]
    _print([change.as_dict() for change in changes], "\n".join(lines), as_json)
    unlike = registry.difference()
    if unlike:
        typer.echo(unlike, err=True)


@app.command()
def check() -> None:
    """Whether the trail has no gap and no fork, MLflow's aliases are as it says, and mlflow/promotion.yaml is valid."""
    from onediff import registry

    registry.load_rules()
    changes = registry.check_trail()
    typer.echo(f"{len(changes)} records, no gap, no fork; MLflow's aliases are as they say; {registry.RULES} is valid")


@app.command()
def repair() -> None:
    """Finish a change that was cut off, or record one that was made outside; every change does so first."""
    from onediff import registry

    typer.echo(f"MLflow's aliases and the trail agree: {registry.repair()}")


def _version_text(row: dict[str, Any]) -> str:
    scores = "  ".join(f"{name} {value:.3f}" for name, value in row["scores"].items())
    refused = f"refused {row['refused']}" if row["refused"] else ""
    return "\n  ".join([f"version {row['version']}  {', '.join(row['aliases']) or '-'}  {row['created']}  "
                        f"weights {row['weights_digest'][:12]}", *filter(None, [scores, *row["changes"], refused])])


def _print(values: Any, text: str, as_json: bool) -> None:
    typer.echo(json.dumps(values, ensure_ascii=False) if as_json else text)
