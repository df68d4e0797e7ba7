"""The command `onediff`: the list of its commands. A command imports heavy packages only when it runs."""

import sys
from collections.abc import Callable

import typer

from onediff.cli import data, project, registry, scoring
from onediff.network import exempt_loopback_from_proxies

COMMANDS: tuple[Callable[..., None], ...] = (
    scoring.caption, project.preset, project.plan, scoring.example, scoring.report, project.manifest, project.doctor,
    scoring.predict, scoring.references, scoring.score, scoring.compare, scoring.judge, scoring.audit,
    registry.lineage, registry.export, project.drift, project.profile, project.gc)

app = typer.Typer(help="Two images in, one sentence about what changed out.", no_args_is_help=True,
                  add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
for command in COMMANDS:
    app.command()(command)
app.add_typer(registry.app, name="registry")
app.add_typer(data.app, name="data")


def main() -> None:
    exempt_loopback_from_proxies()
    try:
        app()
    except (ValueError, OSError) as error:
        sys.exit(f"onediff: {error}")
    except ModuleNotFoundError as error:
        sys.exit(f"onediff: this needs the package {error.name}, which scoring alone does not: "
                 "pip install 'onediff-idc[full]', or 'make setup' in a clone")


if __name__ == "__main__":
    main()
