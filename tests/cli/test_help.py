"""Tests of the help of every command: complete sentences, examples that parse, and no colours in a pipe."""

from __future__ import annotations

import inspect
import os
import pty
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import typer
from typer.testing import CliRunner

from onediff.cli.main import COMMANDS, app
from onediff.cli.output import local_path, output_path

ROOT = Path(__file__).resolve().parents[2]
OPTIONS_OF_ALL = {"help", "as_json"}
ESCAPE = "\x1b["


def commands(command: Any = None, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the words and the object of every command that is not a group."""
    command = command or typer.main.get_command(app)
    if hasattr(command, "commands"):
        for name, child in command.commands.items():
            yield from commands(child, (*words, name))
    else:
        yield words, command


EVERY = [pytest.param(words, command, id=" ".join(words)) for words, command in commands()]


def help_of(*words: str) -> str:
    result = CliRunner().invoke(app, [*words, "--help"])
    assert result.exit_code == 0
    return result.output


def test_the_help_has_one_section_for_each_group() -> None:
    text = help_of()
    positions = [text.index(f"\n{heading}:\n") for heading in COMMANDS]
    assert positions == sorted(positions) and "Commands:" not in text


@pytest.mark.parametrize("words", [(), ("data",), ("registry",)])
def test_no_sentence_is_cut_off_and_no_line_is_too_long(words: tuple[str, ...]) -> None:
    text = help_of(*words)
    assert "..." not in text.replace("[ARGS]...", "") and max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize(("words", "command"), EVERY)
def test_every_command_begins_with_one_sentence_and_has_examples_that_parse(words: tuple[str, ...],
                                                                            command: Any) -> None:
    sentence, _, rest = command.help.partition("\n\n")
    assert re.fullmatch(r"[A-Z].*\.", sentence, re.DOTALL) and not re.search(r"[.:]\s", sentence)
    examples = [line.removeprefix("Example: ") for line in rest.splitlines() if line.startswith("Example: ")]
    assert examples or {parameter.name for parameter in command.params} <= OPTIONS_OF_ALL
    for example in examples:
        name, *arguments = shlex.split(example)
        assert name == "onediff" and tuple(arguments[:len(words)]) == words
        command.make_context(words[-1], arguments[len(words):])
        assert f"  Example: {example}\n" in help_of(*words)


@pytest.mark.parametrize(("words", "command"), EVERY)
def test_every_path_argument_refuses_addresses(words: tuple[str, ...], command: Any) -> None:
    hints = get_type_hints(inspect.unwrap(command.callback), include_extras=True)
    for name, hint in hints.items():
        if "pathlib" in str(hint):
            parser = output_path if name == "out" or words == ("export",) else local_path
            assert hint.__metadata__[0].parser is parser, f"onediff {' '.join(words)}: {name}"


def test_a_path_is_kept_and_an_address_is_refused() -> None:
    assert local_path("images/1.png") == Path("images/1.png")
    with pytest.raises(typer.BadParameter, match=r"'https://example\.com/a\.png' is an address"):
        local_path("https://example.com/a.png")


def test_an_address_for_an_output_is_refused_with_another_cure() -> None:
    with pytest.raises(typer.BadParameter, match=r"is an address.*: give a path on this machine"):
        output_path("https://example.com/p.jsonl")


def test_an_address_instead_of_an_image_is_shown_as_given() -> None:
    result = CliRunner().invoke(app, ["caption", "https://example.com/a.png", "b.png"])
    assert result.exit_code == 2 and "https://example.com/a.png" in result.output and "download" in result.output


def test_common_options_have_short_names() -> None:
    short = {("caption",): "-m", ("predict",): "-o", ("score",): "-p", ("compare",): "-r", ("gc",): "-y"}
    for words, name in short.items():
        assert f"  {name}, --" in help_of(*words) and "-h, --help" in help_of(*words)


def test_the_version_is_that_of_the_package() -> None:
    assert CliRunner().invoke(app, ["--version"]).output == f"onediff {version('onediff-idc')}\n"


def test_completion_can_be_installed_and_completes_commands() -> None:
    assert "--install-completion" in help_of()
    environment = {**os.environ, "_ONEDIFF_COMPLETE": "complete_bash", "COMP_WORDS": "onediff ca", "COMP_CWORD": "1"}
    code = "import sys; sys.argv[0] = 'onediff'; from onediff.cli.main import app; app(prog_name='onediff')"
    completed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, text=True,
                               capture_output=True, check=False)
    assert completed.stdout.split() == ["caption"], completed.stderr


def on_terminal(**environment: str) -> str:
    """Return what `onediff --help` writes to a terminal."""
    parent, child = pty.openpty()
    clean = {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
    process = subprocess.Popen([sys.executable, "-m", "onediff", "--help"], cwd=ROOT, stdout=child, stderr=child,
                               env={**clean, **environment})
    os.close(child)
    chunks = []
    try:
        while chunk := os.read(parent, 4096):
            chunks.append(chunk)
    except OSError:  # Linux reports the end of a terminal as an input/output error.
        pass
    os.close(parent)
    assert process.wait() == 0
    return b"".join(chunks).decode()


def test_colours_appear_on_a_terminal_and_not_in_a_pipe_or_with_no_color() -> None:
    assert ESCAPE in on_terminal()
    assert ESCAPE not in on_terminal(NO_COLOR="1")
    for arguments in (["--help"], ["data", "--help"], ["data", "status"]):
        completed = subprocess.run([sys.executable, "-m", "onediff", *arguments], cwd=ROOT, text=True,
                                   capture_output=True, check=False)
        assert ESCAPE not in completed.stdout + completed.stderr and completed.stdout
