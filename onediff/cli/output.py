"""The code that all commands share: printing, common options, path arguments and the layout of the help.

Commands print their results through this module alone. Colours appear only on a terminal: `typer.echo` removes them
from a pipe or a file, and `use_colour` switches them off where the environment variable NO_COLOR is set.
"""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

Json = Annotated[bool, typer.Option("--json", help="Print one line of JSON instead of text.")]
Model = Annotated[str, typer.Option("--model", "-m", help="A model folder, or a registered version such as "
                                    "models:/onediff/3.")]

SETTINGS = {"help_option_names": ["--help", "-h"]}  # Typer settings that all commands of OneDiff share.


class GroupedCommands(TyperGroup):
    """A Typer command group whose help lists the commands under headings, each with one complete sentence.

    The heading of a command is the `rich_help_panel` under which it was registered. This class exists because Typer's
    plain help has no headings and cuts long sentences, and Typer's rich help doubles the start time.
    """

    def invoke(self, ctx: Any) -> Any:
        """Run a command. The message about a wrong option names the rule and the value, without Pydantic's wording."""
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            if isinstance(error.__cause__, ValueError) and hasattr(error.__cause__, "errors"):
                error.message = "; ".join(map(_broken_rule, error.__cause__.errors()))
            raise

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write one section of the help per heading, in the order in which commands with this heading first occur."""
        sections: dict[str, list[tuple[str, str]]] = {}
        width = max(map(len, self.list_commands(ctx)))
        for name in self.list_commands(ctx):
            command: Any = self.get_command(ctx, name)
            rows = sections.setdefault(command.rich_help_panel or "Commands", [])
            rows.append((typer.style(name.ljust(width), fg="cyan"), _first_paragraph(command.help or "")))
        for heading, rows in sections.items():
            with formatter.section(typer.style(heading, bold=True)):
                formatter.write_dl(rows)


def _broken_rule(item: Any) -> str:
    """Convert a Pydantic error about a command-line option to text such as "must be one of 'a', 'b', got 'c'"."""
    if choices := re.fullmatch(r"Value error, .* is not one of (.*)\.", item["msg"], re.DOTALL):
        return f"must be one of {choices[1]}, got {item['input']!r}"
    rule = item["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    return f"{rule}, got {item['input']!r}"


def _first_paragraph(text: str) -> str:
    return " ".join(text.partition("\n\n")[0].split())


def use_colour() -> bool | None:
    """Return False, which switches colours off, if the environment variable NO_COLOR is set (https://no-color.org).

    Otherwise return None, so that Typer uses colours only on a terminal.
    """
    return False if os.environ.get("NO_COLOR") else None


def local_path(text: str | Path, cure: str = "download the file, then give its path") -> Path:
    """Convert the text of a command-line argument to a path. Raises BadParameter for an address such as https://..."""
    if "://" in str(text):
        raise typer.BadParameter(f"'{text}' is an address, but this command reads and writes only files on this "
                                 f"machine: {cure}.")
    return Path(text)


def output_path(text: str | Path) -> Path:
    """Convert the text of a command-line argument to the path of an output, as `local_path` does."""
    return local_path(text, "give a path on this machine")


def path_argument(help: str, parser: Callable[[str], Path] = local_path) -> Any:
    """Return a Typer declaration of a positional argument that takes a path on this machine and rejects addresses."""
    return typer.Argument(help=help, parser=parser)


def path_option(*names: str, help: str, parser: Callable[[str], Path] = local_path) -> Any:
    """Return a Typer declaration of an option that takes a path on this machine and rejects addresses."""
    return typer.Option(*names, help=help, parser=parser, metavar="PATH")


def out_option(help: str) -> Any:
    """Return a Typer declaration of the option --out, which takes the path of an output file on this machine."""
    return path_option("--out", "-o", help=help, parser=output_path)


def print_text(text: object) -> None:
    """Print text to stdout, with colours only if stdout is a terminal."""
    typer.echo(text)


def print_warning(text: object) -> None:
    """Print a warning to stderr, so that stdout contains only the result, which another program may read."""
    typer.echo(text, err=True)


def print_result(result: Any, text: str, as_json: bool) -> None:
    """Print `result` as one line of JSON if `as_json` is True; otherwise print `text`, the readable form of it."""
    print_text(json.dumps(result, ensure_ascii=False) if as_json else text)


def error_message(error: Exception) -> str:
    """Return the line that a command prints to stderr after the exception `error`."""
    if isinstance(error, ModuleNotFoundError):
        return (f"onediff: this command needs the package {error.name}, which an installation for scoring alone does "
                "not include: run \"pip install 'onediff-idc[full]'\", or 'make setup' in a clone")
    if isinstance(error, OSError) and error.errno and error.filename:  # an error of the operating system
        return (f"onediff: {error.filename}: {error.strerror}: check that this path is correct, and that you may read "
                "and write there")
    return f"onediff: {error}"
