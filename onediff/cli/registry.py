"""The commands for versions of the model: `onediff registry ...`, `onediff lineage` and `onediff export`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from onediff.cli.output import (
    SETTINGS,
    GroupedCommands,
    Json,
    output_path,
    path_argument,
    path_option,
    print_result,
    print_text,
    print_warning,
)
from onediff.paths import TRAINED, check_project

app = typer.Typer(cls=GroupedCommands, help="List, register, promote and roll back versions of the model.",
                  no_args_is_help=True, context_settings=SETTINGS)

VERSION = "A version number, an alias such as champion, or an MLflow address such as models:/onediff/3."
Why = Annotated[str | None, typer.Option(help="The reason, which the audit trail records.")]


@app.command("list")
def list_versions(as_json: Json = False) -> None:
    """List the registered model versions with aliases and scores.

    The newest version comes first. The scores are those of the `gate` split.

    Example: onediff registry list
    """
    from onediff import registry

    rows = registry.list_versions()
    print_result(rows, "\n".join(map(_version_text, rows))
                 or "No version is registered yet: 'make run' registers one.", as_json)


@app.command()
def register(model: Annotated[Path, path_option("--model", "-m", help="The model folder.")] = TRAINED) -> None:
    """Register the trained model and make it the candidate.

    If the same model is already registered, it keeps its version number.

    Example: onediff registry register --model data/models/tune
    """
    from onediff import registry
    from onediff.ops import candidate

    version = candidate.register(model)
    print_text(f"version {version}; 'onediff registry promote {version}' submits it to the deployment"
               if registry.shared() else f"version {version} is the candidate")


@app.command()
def promote(version: Annotated[str | None, typer.Argument(help="The version number; without it, the "
                                                          "candidate.")] = None,
            why: Why = None) -> None:
    """Make a model version champion if it passes the gate.

    The gate is the list of checks in mlflow/promotion.yaml. If several machines share the registry, the command starts
    the Prefect deployment `promote`, which makes the change.

    Example: onediff registry promote 3 --why "fewer false alarms"
    """
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
    replaced = f"; it replaces version {verdict.replaced}" if verdict.replaced else ""
    print_text(f"version {verdict.version} is champion{replaced}")


@app.command()
def rollback(why: Why = None) -> None:
    """Make the previous champion the champion again.

    If several machines share the registry, the command starts the Prefect deployment `rollback`, which makes the
    change.

    Example: onediff registry rollback --why "misses small objects"
    """
    from onediff import registry

    if registry.shared():
        from flows import deployments

        print_text(deployments.submit(deployments.ROLLBACK, why=why))
        return
    print_text(f"version {registry.rollback(why=why)} is champion again")


@app.command()
def trail(as_json: Json = False) -> None:
    """Print the audit trail, which lists every change of an alias.

    The aliases of model versions are candidate, champion and previous. If the aliases in MLflow differ from the audit
    trail, the command prints the difference to stderr.

    Example: onediff registry trail --json
    """
    from onediff import registry, tracking

    if not tracking.exists():
        check_project()
    changes = registry.trail()
    print_result([change.as_dict() for change in changes],
                 "\n".join(map(str, changes)) or "No alias has changed yet.", as_json)
    if difference := registry.difference():
        print_warning(difference)


@app.command()
def check() -> None:
    """Check the audit trail, the aliases and the promotion rules.

    The records of the audit trail must form one chain without a gap, the aliases in MLflow must agree with the
    records, and mlflow/promotion.yaml must be valid.

    Example: onediff registry check
    """
    from onediff import registry

    registry.load_rules()
    print_text(f"{len(registry.check_trail())} records without a gap or a fork; MLflow's aliases agree with them; "
               f"{registry.RULES} is valid")


@app.command()
def repair() -> None:
    """Make MLflow's aliases and the audit trail agree.

    The command finishes a change of an alias that was interrupted, or records a change that was made outside of
    OneDiff. The commands that change an alias do this automatically before the change.

    Example: onediff registry repair
    """
    from onediff import registry

    print_text(f"MLflow's aliases and the audit trail agree: {registry.repair()}")


def _version_text(row: dict[str, Any]) -> str:
    scores = "  ".join(f"{name} {value:.3f}" for name, value in row["scores"].items())
    refused = f"refused {row['refused']}" if row["refused"] else ""
    return "\n  ".join([f"version {row['version']}  {', '.join(row['aliases']) or '-'}  {row['created']}  "
                        f"weights {row['weights_digest'][:12]}", *filter(None, [scores, *row["changes"], refused])])


def lineage(version: Annotated[str | None, typer.Argument(help=VERSION)] = None,
            of: Annotated[str | None, typer.Option(metavar="PATH_OR_DIGEST", help="List the versions that were made "
                                                   "with this file, folder or digest.")] = None,
            verify: Annotated[bool, typer.Option("--verify", help="Check code, data and weights by digest, then score "
                                                 "and caption again. Exit code 1 if anything differs.")] = False,
            as_json: Json = False) -> None:
    """Show from which data, code and runs a model version was made.

    With --of, the command shows which model versions were made with a file. See docs/lineage.md.

    Example: onediff lineage champion --verify

    Example: onediff lineage --of data/diffcap/train-00001.parquet
    """
    from onediff.ops.lineage import as_text, lineage_of, versions_of

    if (version is None) == (of is None):
        raise ValueError("give either a model version, or the option --of with a path or a digest")
    if verify and version is None:
        raise ValueError("--verify needs a model version, such as 'onediff lineage champion --verify'; it cannot check "
                         "--of")
    if version is not None and verify:
        _verify(version, as_json)
    elif version is not None:
        result = lineage_of(version)
        print_result(result, as_text(result), as_json)
    elif of is not None:
        uses, without_lineage = versions_of(of)
        workspace = {True: ", and the workspace has the same bytes", False: ", and the workspace has OTHER bytes",
                     None: ""}
        lines = [f"version {use.version}{''.join(f' ({alias})' for alias in use.aliases)} {use.role}: "
                 f"{use.path} {use.digest}{workspace[use.here]}" for use in uses] \
            or [f"no version has {of} in its lineage"]
        if without_lineage:
            lines.append(f"unknown for version {', '.join(without_lineage)}, which was registered without a lineage")
        print_result({"of": of, "versions": [asdict(use) for use in uses], "without_lineage": without_lineage},
                     "\n".join(lines), as_json)


def export(version: Annotated[str, typer.Argument(help=VERSION)],
           folder: Annotated[Path, path_argument("A new folder.", parser=output_path)]) -> None:
    """Write a model version to a folder that from_pretrained loads.

    The folder contains weights, processor, model card, licence and lineage (the data, code and runs of the version).

    Example: onediff export champion onediff-champion
    """
    from onediff.ops import export as exporting

    exporting.export(version, folder)
    print_text(f"{folder}: version {version}, model card in {folder}/README.md\n"
               f"To upload it to the Hugging Face Hub, run: hf upload YOUR_NAME/onediff {folder}")


def _verify(version: str, as_json: bool) -> None:
    """Verify a model version: print the result of each check, then a summary. Exit with code 1 if a check failed."""
    from onediff.ops import verify as verification

    checks = []
    for check in verification.verify(version):
        checks.append(check)
        if not as_json:
            print_text(check)
    num_failed = sum(bool(check.problem) for check in checks)
    print_result({"version": version, "verified": not num_failed, "checks": [asdict(check) for check in checks]},
                 f"version {version}: " + (f"{num_failed} of {len(checks)} checks FAILED" if num_failed
                                           else f"verified, {len(checks)} checks passed"), as_json)
    if num_failed:
        raise typer.Exit(1)
