"""Functions that all benchmark scripts use: the command line, tables, and commands in a clone of the project."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from onediff.files import write_text

ROOT = Path(__file__).resolve().parents[1]
MARK = "<!-- table -->"  # Scripts replace everything below this line of a Markdown page.


def main(command: Callable[..., Any] | typer.Typer) -> None:
    """Run `command` with options from the command line; ValueError and OSError exit with a one-line message."""
    try:
        command() if isinstance(command, typer.Typer) else typer.run(command)
    except (ValueError, OSError) as error:
        sys.exit(f"benchmarks.{Path(sys.argv[0]).stem}: {error}")


def show(table: Table) -> None:
    """Print a table, at least 170 characters wide, so that no column is cut."""
    Console(width=max(170, Console().width)).print(table)


def write_table(page: Path, lines: Sequence[str]) -> None:
    """Print the lines of a Markdown table, and write them into `page` below MARK."""
    text = "\n".join(lines)
    print(text)
    head = page.read_text(encoding="utf-8").split(MARK)[0] if page.exists() else ""
    write_text(page, f"{head}{MARK}\n{text}\n")


def write_block(page: Path, name: str, lines: Sequence[str]) -> None:
    """Replace the lines of `page` between the lines "<!-- NAME -->" and "<!-- end of NAME -->".

    Raises ValueError if the page does not have both lines.
    """
    first, last, text = f"<!-- {name} -->\n", f"<!-- end of {name} -->", page.read_text(encoding="utf-8")
    if first not in text or last not in text:
        raise ValueError(f"{page}: must have the lines '{first.strip()}' and '{last}' around a table, but has not; add "
                         "them where the table belongs")
    head, rest = text.split(first, 1)
    write_text(page, head + first + "\n".join([*lines, last]) + rest.split(last, 1)[1])


def table(title: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    return [_row(title), "|---" * len(title) + "|", *map(_row, rows)]


def _row(cells: Sequence[str]) -> str:
    return "|" + "".join(f" {cell} |" if cell else " |" for cell in cells)


def run(command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> str:
    """Run a command and return its standard output.

    Raises ValueError with the end of the standard output and of the standard error if the command fails.
    """
    done = subprocess.run(command, cwd=folder, env=environment, text=True, capture_output=True, check=False)
    if done.returncode:
        raise ValueError(f"{' '.join(command)} ended with code {done.returncode}: {done.stdout[-2000:]}"
                         f"{done.stderr[-2000:]}")
    return done.stdout


def clone(folder: Path) -> None:
    """Clone the last commit of this project into `folder`."""
    subprocess.run(["git", "clone", "-q", str(ROOT), str(folder)], check=True)


def project_environment(folder: Path) -> dict[str, str]:
    """Return environment variables for a process that runs the code of a clone with the installed packages.

    The variables of Prefect and MLflow are left out, so that the clone uses its own servers and stores.
    """
    own = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "MLFLOW_"))}
    return own | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
                         "PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1", "DVC_NO_ANALYTICS": "1"}
