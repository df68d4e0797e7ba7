"""Runs the command line of `onediff` in the process of a test."""

import sys

import pytest

from onediff.cli import main as cli


def run_cli(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str | int | None:
    """Run `onediff` with these arguments and return the exit code, or the error message."""
    monkeypatch.setattr(sys, "argv", ["onediff", *arguments])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    return exit_.value.code
