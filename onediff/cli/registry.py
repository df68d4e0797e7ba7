"""Versions of the model: `onediff registry ...`, `lineage` and `export`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from onediff.cli.output import Json, print_result, print_text
from onediff.paths import TRAINED

app = typer.Typer(help="Versions of the model: list, register, promote, rollback, trail.", no_args_is_help=True)

VERSION = "Its number, an alias such as champion, or an MLflow address."
Why = Annotated[str | None, typer.Option(help="For the trail.")]


@app.command("list")
def list_versions(as_json: Json = False) -> None:
    """Every version, newest first, with its aliases and gate scores."""
    from onediff import registry

    rows = registry.list_versions()
    print_result(rows, "\n".join(map(_version_text, rows)) or "no version yet: 'make run' registers one", as_json)


@app.command()
def register(model: Annotated[Path, typer.Option(help="The model folder.")] = TRAINED) -> None:
    """Make the trained model a version and the candidate; the same model folder stays the same version."""
    from onediff import registry
    from onediff.ops import candidate

    version = candidate.register(model)
    print_text(f"version {version}; 'onediff registry promote {version}' submits it to the deployment"
               if registry.shared() else f"version {version} is the candidate")


@app.command()
def promote(version: Annotated[str | None, typer.Argument(help="Default: the candidate.")] = None,
            why: Why = None) -> None:
    """Make a version champion if mlflow/promotion.yaml lets it. On a shared server the deployment `promote` does it."""
    from onediff import registry

    if registry.shared():
        from flows import deployments

        print_text(deployments.submit(deployments.PROMOTE, version=version, why=why))
        return
    approved = None
    if registry.load_rules().approval_h and (opinion := registry.assess(version)).promoted and not opinion.reasons:
        approved = opinion.case
        typer.confirm(f"Shall {approved} become champion?", abort=True)
    verdict = registry.promote(version, why=why, approved=approved)
    if not verdict.promoted:
        raise ValueError("\n  ".join([f"version {verdict.version} is refused:", *verdict.reasons]))
    was = f"; version {verdict.replaced} was" if verdict.replaced else ""
    print_text(f"version {verdict.version} is champion{was}")


@app.command()
def rollback(why: Why = None) -> None:
    """Make the previous champion champion again. On a shared server the deployment `rollback` does it."""
    from onediff import registry

    if registry.shared():
        from flows import deployments

        print_text(deployments.submit(deployments.ROLLBACK, why=why))
        return
    print_text(f"version {registry.rollback(why=why)} is champion again")


@app.command()
def trail(as_json: Json = False) -> None:
    """Every change of candidate, champion and previous, by number; and whether MLflow's aliases are as it says."""
    from onediff import registry

    changes = registry.trail()
    print_result([change.as_dict() for change in changes], "\n".join(map(str, changes)) or "no change yet", as_json)
    if difference := registry.difference():
        typer.echo(difference, err=True)


@app.command()
def check() -> None:
    """Whether the trail has no gap and no fork, MLflow's aliases are as it says, and mlflow/promotion.yaml is valid."""
    from onediff import registry

    registry.load_rules()
    print_text(f"{len(registry.check_trail())} records, no gap, no fork; MLflow's aliases are as they say; "
               f"{registry.RULES} is valid")


@app.command()
def repair() -> None:
    """Finish a change that was cut off, or record one that was made outside; every change does so first."""
    from onediff import registry

    print_text(f"MLflow's aliases and the trail agree: {registry.repair()}")


def _version_text(row: dict[str, Any]) -> str:
    scores = "  ".join(f"{name} {value:.3f}" for name, value in row["scores"].items())
    refused = f"refused {row['refused']}" if row["refused"] else ""
    return "\n  ".join([f"version {row['version']}  {', '.join(row['aliases']) or '-'}  {row['created']}  "
                        f"weights {row['weights_digest'][:12]}", *filter(None, [scores, *row["changes"], refused])])


def lineage(version: Annotated[str | None, typer.Argument(help=VERSION)] = None,
            of: Annotated[str | None, typer.Option(metavar="PATH_OR_DIGEST", help="Which versions were made with this "
                                                   "file, folder or digest.")] = None,
            verify: Annotated[bool, typer.Option("--verify", help="Prove it: code, data and weights by digest, scores "
                                                 "and captions again; exit code 1 if anything differs.")] = False,
            as_json: Json = False) -> None:
    """What a version was made of, back to the sources; with --of, which versions were made with a file."""
    from onediff.ops.lineage import as_text, lineage_of, versions_of

    if (version is None) == (of is None):
        raise ValueError("give a version, or --of with a path or digest")
    if version is not None and verify:
        _verify(version, as_json)
    elif version is not None:
        result = lineage_of(version)
        print_result(result, as_text(result), as_json)
    elif of is not None:
        uses, without_lineage = versions_of(of)
        now = {True: ", the bytes that are here now", False: ", OTHER bytes than are here now", None: ""}
        lines = [f"version {use.version}{''.join(f' ({alias})' for alias in use.aliases)} {use.role}: "
                 f"{use.path} {use.digest}{now[use.here]}" for use in uses] or [f"no version has {of} in its lineage"]
        if without_lineage:
            lines.append(f"nothing is known of version {', '.join(without_lineage)}, which carries no lineage")
        print_result({"of": of, "versions": [asdict(use) for use in uses], "without_lineage": without_lineage},
                     "\n".join(lines), as_json)


def export(version: Annotated[str, typer.Argument(help=VERSION)],
           folder: Annotated[Path, typer.Argument(help="A new folder.")]) -> None:
    """Write a version as a folder that from_pretrained loads: weights, processor, model card, licence, lineage."""
    from onediff.ops import export as exporting

    exporting.export(version, folder)
    print_text(f"{folder}: version {version}, model card in {folder}/README.md\n"
               f"to put it on the Hub, which is not done here: hf upload YOUR_NAME/onediff {folder}")


def _verify(version: str, as_json: bool) -> None:
    from onediff.ops import verify as proving

    checks = []
    for check in proving.verify(version):
        checks.append(check)
        if not as_json:
            print_text(check)
    num_failed = sum(bool(check.problem) for check in checks)
    print_result({"version": version, "verified": not num_failed, "checks": [asdict(check) for check in checks]},
                 f"version {version}: " + (f"{num_failed} of {len(checks)} checks FAILED" if num_failed
                                           else f"proven, {len(checks)} checks"), as_json)
    if num_failed:
        raise typer.Exit(1)
