"""What the scripts share: their command line, their table, and commands that they run."""

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
MARK = "<!-- table -->"  # in a page: what follows is written by a script


def main(command: Callable[..., Any]) -> None:
    """The function as a command. An error in the input or of the system becomes one line."""
    try:
        typer.run(command)
    except (ValueError, OSError) as error:
        sys.exit(f"benchmarks.{Path(sys.argv[0]).stem}: {error}")


def show(table: Table) -> None:
    Console(width=max(170, Console().width)).print(table)


def write_table(page: Path, lines: Sequence[str]) -> None:
    """Prints a table in Markdown and puts it into a page, below MARK."""
    text = "\n".join(lines)
    print(text)
    head = page.read_text(encoding="utf-8").split(MARK)[0] if page.exists() else ""
    write_text(page, f"{head}{MARK}\n{text}\n")


def run(command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> str:
    """The standard output of the command. Raises ValueError with the end of all output if the command fails."""
    done = subprocess.run(command, cwd=folder, env=environment, text=True, capture_output=True, check=False)
    if done.returncode:
        raise ValueError(f"{' '.join(command)} ended with code {done.returncode}: {done.stdout[-2000:]}"
                         f"{done.stderr[-2000:]}")
    return done.stdout


def clone(folder: Path) -> None:
    """A clone of this checkout's last commit."""
    subprocess.run(["git", "clone", "-q", str(ROOT), str(folder)], check=True)


def project_environment(folder: Path) -> dict[str, str]:
    """The variables of a process that runs the code of the clone with the packages of this environment."""
    return os.environ | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
                         "PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1", "DVC_NO_ANALYTICS": "1"}
