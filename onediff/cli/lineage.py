"""Where a version comes from, and a version as a folder of its own. Thin, like cli.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer()

Json = Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")]
Version = Annotated[str, typer.Argument(help="Its number, an alias such as champion, or an MLflow address.")]


@app.command()
def lineage(version: Annotated[str | None, typer.Argument(help="Its number, an alias such as champion, or an MLflow "
                                                          "address.")] = None,
            of: Annotated[str | None, typer.Option(metavar="PATH_OR_DIGEST", help="Which versions were made with this "
                                                   "file, folder or digest.")] = None,
            verify: Annotated[bool, typer.Option("--verify", help="Prove it: code, data and weights by digest, scores "
                                                 "and captions again; exit code 1 if anything differs.")] = False,
            as_json: Json = False) -> None:
    """What a version was made of, back to the sources; with --of, which versions were made with a file."""
    if (version is None) == (of is None):
        raise ValueError("give a version, or --of with a path or digest")
    if of is not None:
        _versions_of(of, as_json)
    elif verify:
        _verify(str(version), as_json)
    else:
        from onediff.ops import lineage as tracing

        found = tracing.told(str(version))
        _print(found, tracing.text(found), as_json)


@app.command()
def export(version: Version, folder: Annotated[Path, typer.Argument(help="A new folder.")]) -> None:
    """Write a version as a folder that from_pretrained loads: weights, processor, model card, licence, lineage."""
    from onediff.ops import export as exporting

    exporting.export(version, folder)
    typer.echo(f"{folder}: version {version}, model card in {folder}/README.md\n"
               f"to put it on the Hub, which is not done here: hf upload YOUR_NAME/onediff {folder}")


def _versions_of(item: str, as_json: bool) -> None:
    from dataclasses import asdict

    from onediff.ops import lineage as tracing

    uses, unknown = tracing.versions_of(item)
    now = {True: ", the bytes that are here now", False: ", OTHER bytes than are here now", None: ""}
    lines = [f"version {use.version}{''.join(f' ({alias})' for alias in use.aliases)} {use.role}: "
             f"{use.path} {use.digest}{now[use.here]}" for use in uses] or [f"no version has {item} in its lineage"]
    if unknown:
        lines.append(f"nothing is known of version {', '.join(unknown)}, which carries no lineage")
    told = {"of": item, "versions": [asdict(use) for use in uses], "without_lineage": unknown}
    _print(told, "\n".join(lines), as_json)


def _verify(version: str, as_json: bool) -> None:
    from onediff.ops import verify as proving

    checks = []
    for check in proving.verify(version):
        checks.append(check)
        if not as_json:
            typer.echo(str(check))
    failed = sum(bool(check.problem) for check in checks)
    told = {"version": version, "verified": not failed, "checks": [vars(check) for check in checks]}
    _print(told, f"version {version}: " + (f"{failed} of {len(checks)} checks FAILED" if failed
                                           else f"proven, {len(checks)} checks"), as_json)
    if failed:
        raise typer.Exit(1)


def _print(values: Any, text: str, as_json: bool) -> None:
    typer.echo(json.dumps(values, ensure_ascii=False) if as_json else text)
