"""Signals and closed output, tested in separate processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.interrupts import Terminal, wait_until
from onediff.interrupts import SIGNALS, Stop, postponed

ROOT = Path(__file__).resolve().parent.parent


def start(code: str, *, folder: Path | None = None, ignored: tuple[signal.Signals, ...] = ()) -> subprocess.Popen[str]:
    """Start a process that runs Python code, and wait until it has printed "up"."""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)},
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: [signal.signal(number, signal.SIG_IGN) for number in ignored])
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    return process


@pytest.mark.parametrize("number", SIGNALS)
def test_a_postponed_signal_is_recorded_and_the_previous_handlers_are_restored(number: signal.Signals) -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    with postponed(Stop()) as stop:
        assert stop.reason == ""
        signal.raise_signal(number)
        assert stop.reason == number.name
        signal.raise_signal(signal.SIGTERM)
        assert stop.reason == number.name
    assert [signal.getsignal(each) for each in SIGNALS] == before


@pytest.mark.parametrize("number", SIGNALS)
def test_only_the_first_signal_raises_keyboard_interrupt(number: signal.Signals) -> None:
    process = start("import time; from onediff import interrupts; interrupts.raise_keyboard_interrupt(9); "
                    "\n"
                    "try: print('up', flush=True); time.sleep(60)\n"
                    "except KeyboardInterrupt as interrupt:\n"
                    "    print(interrupt, flush=True); time.sleep(1); print('saved')")
    process.send_signal(number)
    assert process.stdout is not None and process.stdout.readline() == f"{number.name}\n"
    for again in SIGNALS:
        process.send_signal(again)
    assert process.communicate(timeout=30) == ("saved\n", "") and process.returncode == 0


def test_a_signal_during_a_destructor_is_not_lost() -> None:
    process = start("import time; from onediff import interrupts; interrupts.raise_keyboard_interrupt(9)\n"
                    "class Slow:\n"
                    "    def __del__(self): print('up', flush=True); time.sleep(1)\n"
                    "try: Slow(); time.sleep(60)\n"
                    "except KeyboardInterrupt as interrupt: print(interrupt)")
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30) == ("SIGINT\n", "")


def test_a_signal_that_nohup_ignores_stays_ignored() -> None:
    process = start("import time; from onediff import interrupts; interrupts.raise_keyboard_interrupt(9); "
                    "print('up', flush=True); time.sleep(1); print('done')", ignored=(signal.SIGHUP,))
    process.send_signal(signal.SIGHUP)
    assert process.communicate(timeout=30) == ("done\n", "")


@pytest.mark.parametrize("package", ["onediff.stages", "flows"])
def test_a_signal_during_the_imports_ends_a_command_with_one_line(package: str, tmp_path: Path) -> None:
    process = start(f"import sys, time; sys.argv[0] = '-m'; import {package}; print('up', flush=True); time.sleep(60)",
                    folder=tmp_path)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[1] == (
        "onediff: stopped by SIGINT before it did any work; run the command again\n")
    assert process.returncode == 128 + signal.SIGINT


def test_a_command_without_own_handlers_uses_the_default_handlers_of_python() -> None:
    process = start("import sys, time; sys.argv[0] = '-m'; import onediff.stages; from onediff import interrupts\n"
                    "interrupts.handle_as_python_does()\n"
                    "try: print('up', flush=True); time.sleep(60)\n"
                    "except KeyboardInterrupt: print('cleaned up')")
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30) == ("cleaned up\n", "")


def test_a_signal_during_the_exit_of_python_can_end_a_process_without_a_stack_trace() -> None:
    process = start("import atexit, time; from onediff import interrupts\n"
                    "atexit.register(lambda: (print('up', flush=True), time.sleep(60)))\n"
                    "atexit.register(interrupts.use_default_actions)")
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30) == ("", "")
    assert process.returncode == -signal.SIGINT


def test_a_process_continues_after_its_output_was_closed(tmp_path: Path) -> None:
    process = start("import sys, time; from pathlib import Path; from onediff import interrupts; "
                    "interrupts.survive_closed_output(); print('up', flush=True)\n"
                    "while not Path('closed').exists(): time.sleep(0.1)\n"
                    "print('x' * 100_000, flush=True); print('y', file=sys.stderr); Path('saved').touch()",
                    folder=tmp_path)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    process.stderr.close()
    (tmp_path / "closed").touch()
    assert process.wait(timeout=30) == 0 and (tmp_path / "saved").exists()


def test_a_flow_continues_after_its_log_output_was_closed(tmp_path: Path) -> None:
    """This happens in `make run 2>&1 | head -3`, where the logging library of Prefect once ended the flow."""
    (tmp_path / "work.py").write_text(
        "import time; from pathlib import Path; from flows import command; from prefect.logging import get_logger\n"
        "command.survive_closed_output(); print('up', flush=True)\n"
        "while not Path('closed').exists(): time.sleep(0.05)\n"
        "get_logger().error('x'); Path('saved').touch()")
    process = subprocess.Popen([sys.executable, "work.py"], cwd=tmp_path, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    process.stdout.close()
    (tmp_path / "closed").touch()
    assert process.wait(timeout=60) == 0 and (tmp_path / "saved").exists()


@pytest.mark.parametrize(("trap", "reason"), [(":", "SIGHUP"), ("''", "")])
def test_a_process_started_by_make_is_informed_of_a_closed_terminal_and_saves(trap: str, reason: str,
                                                                              tmp_path: Path) -> None:
    """A shell replaces make in this test. It does not forward SIGHUP to the process, or it ignores SIGHUP like nohup.
    """
    (tmp_path / "work.py").write_text(
        "import time; from pathlib import Path; from onediff import interrupts; interrupts.survive_closed_output()\n"
        "with interrupts.postponed(interrupts.Stop()) as stop:\n"
        "    Path('up').touch(); time.sleep(2); print('x', flush=True); Path('saved').write_text(stop.reason)")
    terminal = Terminal(tmp_path, ("bash", "-c", f"trap {trap} HUP; {sys.executable} work.py; true"),
                        {**os.environ, "PYTHONPATH": str(ROOT)})
    assert wait_until((tmp_path / "up").exists, 30) < 30
    _, remaining, _ = terminal.interrupt("SIGHUP")
    assert not remaining and (tmp_path / "saved").read_text() == reason
