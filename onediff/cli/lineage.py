"""`onediff lineage` and `onediff export`: where a version comes from, and a version as a folder."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from onediff.cli.output import Json, print_result, print_text

VERSION = "Its number, an alias such as champion, or an MLflow address."


def lineage(version: Annotated[str | None, typer.Argument(help=VERSION)] = None,
            of: Annotated[str | None, typer.Option(metavar="PATH_OR_DIGEST", help="Which versions were made with this "
                                                   "file, folder or digest.")] = None,
            verify: Annotated[bool, typer.Option("--verify", help="Prove it: code, data and weights by digest, scores "
                                                 "and captions again; exit code 1 if anything differs.")] = False,
            as_json: Json = False) -> None:
    """What a version was made of, back to the sources; with --of, which versions were made with a file."""
    from onediff.ops.lineage import as_text, lineage_of

    if version is not None and of is None:
        if verify:
            _verify(version, as_json)
        else:
            result = lineage_of(version)
            print_result(result, as_text(result), as_json)
    elif version is None and of is not None:
        _print_versions_of(of, as_json)
    else:
        raise ValueError("give a version, or --of with a path or digest")


def export(version: Annotated[str, typer.Argument(help=VERSION)],
           folder: Annotated[Path, typer.Argument(help="A new folder.")]) -> None:
    """Write a version as a folder that from_pretrained loads: weights, processor, model card, licence, lineage."""
    from onediff.ops import export as exporting

    exporting.export(version, folder)
    print_text(f"{folder}: version {version}, model card in {folder}/README.md\n"
               f"to put it on the Hub, which is not done here: hf upload YOUR_NAME/onediff {folder}")


def _print_versions_of(item: str, as_json: bool) -> None:
    from onediff.ops.lineage import versions_of

    uses, without_lineage = versions_of(item)
    now = {True: ", the bytes that are here now", False: ", OTHER bytes than are here now", None: ""}
    lines = [f"version {use.version}{''.join(f' ({alias})' for alias in use.aliases)} {use.role}: "
             f"{use.path} {use.digest}{now[use.here]}" for use in uses] or [f"no version has {item} in its lineage"]
    if without_lineage:
        lines.append(f"nothing is known of version {', '.join(without_lineage)}, which carries no lineage")
    print_result({"of": item, "versions": [asdict(use) for use in uses], "without_lineage": without_lineage},
                 "\n".join(lines), as_json)


def _verify(version: str, as_json: bool) -> None:
    """Prints each check when it is done, or all of them as JSON."""
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
