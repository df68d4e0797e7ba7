"""The command `onediff`, and the table of its commands. Heavy packages are imported only when a command runs."""

import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from typing import Annotated

import typer

from onediff.cli import data, project, registry, scoring, serve
from onediff.cli.output import SETTINGS, GroupedCommands, error_message, print_text, use_colour
from onediff.network import exempt_loopback_from_proxies

COMMANDS: dict[str, tuple[Callable[..., None] | tuple[str, typer.Typer], ...]] = {
    "Use": (scoring.caption, scoring.example, serve.serve),
    "Data": (("data", data.app), scoring.audit),
    "Training": (project.preset, project.plan, project.manifest),
    "Evaluation": (scoring.predict, scoring.references, scoring.score, scoring.compare, scoring.judge, scoring.report),
    "Registry": (("registry", registry.app), registry.lineage, registry.export),
    "Housekeeping": (project.doctor, project.drift, project.profile, project.gc),
}

app = typer.Typer(cls=GroupedCommands, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None,
                  context_settings=SETTINGS)
for heading, commands in COMMANDS.items():
    for command in commands:
        if isinstance(command, tuple):
            app.add_typer(command[1], name=command[0], rich_help_panel=heading)
        else:
            app.command(rich_help_panel=heading)(command)


def _print_version(requested: bool) -> None:
    if requested:
        try:
            print_text(f"onediff {installed_version('onediff-idc')}")
        except PackageNotFoundError:
            raise ValueError("the version of OneDiff is unknown, because the package onediff-idc is not installed: run "
                             "'make setup' in a clone of the repository") from None
        raise typer.Exit


@app.callback(epilog="Start with 'onediff doctor', or with README.md. 'onediff COMMAND --help' explains a command.")
def _options(version: Annotated[bool, typer.Option("--version", "-V", is_eager=True, callback=_print_version,
                                                   help="Print the version of OneDiff and exit.")] = False) -> None:
    """Describe in one sentence what changed between two images."""


def main() -> None:
    """Run the command line. For an error that the user can correct, print one line to stderr and exit with code 1."""
    exempt_loopback_from_proxies()
    try:
        app(color=use_colour())
    except (ValueError, OSError, ModuleNotFoundError) as error:
        sys.exit(error_message(error))


if __name__ == "__main__":
    main()
