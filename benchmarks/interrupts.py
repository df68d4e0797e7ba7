"""Interrupts runs at random moments, starts them again, and compares the results with those of an undisturbed run.

    python -m benchmarks.interrupts [--seed SEED] [--folder FOLDER]

The script creates a project of micro size, with a `tune` phase of 200 steps, in FOLDER or in a temporary folder, and
runs it once undisturbed. For each interrupt, it makes one stage stale, starts a command in a new terminal, and stops
the command in one of three ways: Ctrl-C, SIGTERM to the command alone, or closing the terminal. The table shows how
long it took until no process was left, and whether the next run of the command produced equal files.
"""

import os
import pty
import random
import select
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
from rich.table import Table
from ruamel.yaml import YAML

from benchmarks import script

MARK = "ONEDIFF_INTERRUPTED_RUN"
STEPS, LIMIT_S = 200, 15
FLOW, REPRO = ("python", "-m", "flows.retrain"), ("dvc", "repro")
MAKE = ("make", "-o", ".venv/.installed", "run")  # With -o, make does not install the Python environment again.
# Each case has a signal, a command, a stage (None: before the first stage), and the range of seconds until the signal.
CASES = (
    ("SIGINT", MAKE, "tune", (4, 25)), ("SIGTERM", FLOW, "tune", (4, 25)), ("SIGHUP", MAKE, "tune", (4, 25)),
    ("SIGINT", REPRO, "tune", (4, 25)), ("SIGTERM", MAKE, "tune", (4, 25)), ("SIGHUP", REPRO, "tune", (4, 25)),
    ("SIGINT", FLOW, "synthesize@scenes", (0, 6)), ("SIGTERM", REPRO, "build", (0, 8)),
    ("SIGHUP", FLOW, "align", (0, 10)), ("SIGINT", MAKE, "caption", (0, 10)), ("SIGTERM", FLOW, "score", (0, 10)),
    ("SIGINT", FLOW, None, (0, 15)))
HEAD = ["signal", "command", "stage", "after s", "ended in s", "processes left", "tracebacks", "next run s", "bytes"]
# These outputs contain run ids or times, so they differ between runs with equal results.
VARIES = ("data/runs/", "data/curves/", "data/report.html", "data/figures")


class Terminal:
    """A command that runs in a new pseudo-terminal, so that it can be interrupted like a user's command."""

    def __init__(self, folder: Path, command: Sequence[str], env: Mapping[str, str]) -> None:
        self.output = bytearray()
        self.mark = f"{os.getpid()}-{time.monotonic()}"
        self.pid, self.screen = pty.fork()
        if self.pid == 0:
            # A shell makes background jobs ignore SIGINT and SIGHUP, but the command must be able to receive them.
            for number in (signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            os.chdir(folder)
            os.execvpe(command[0], command, {**env, MARK: self.mark})
        self.closing = False
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        with suppress(OSError):  # Reading fails when the last process has closed the terminal.
            while not self.closing:
                if select.select([self.screen], [], [], 0.1)[0]:
                    self.output += os.read(self.screen, 65536)

    def interrupt(self, kind: str) -> tuple[float, int, str]:
        """Interrupt the command; return the seconds until it ended, the number of remaining processes, and the output.

        `kind` is SIGINT (Ctrl-C), SIGTERM or SIGHUP (close the terminal). Processes that still run after a minute are
        counted and killed.
        """
        start = len(self.output)
        if kind == "SIGINT":
            os.write(self.screen, b"\x03")
        elif kind == "SIGTERM":
            os.kill(self.pid, signal.SIGTERM)
        else:
            # The reading thread must stop first, because the terminal stays open while the thread reads from it.
            self.closing = True
            self.reader.join()
            os.close(self.screen)
        seconds = wait_until(lambda: not self.processes(), 60)
        remaining = self.processes()
        for process in remaining:
            process.kill()
        os.waitpid(self.pid, 0)
        return seconds, len(remaining), self.output[start:].decode(errors="replace")

    def processes(self) -> list[psutil.Process]:
        """Return the running processes that the command started."""
        live = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):  # psutil raises an error for ended processes and those of another user.
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    live.append(process)
        return live


def wait_until(condition: Callable[[], object], limit_s: float, *, every_s: float = 0.1) -> float:
    """Wait until `condition` returns a true value, at most `limit_s` seconds, and return the seconds that passed."""
    start = time.monotonic()
    while not condition() and time.monotonic() - start < limit_s:
        time.sleep(every_s)
    return time.monotonic() - start


def main(seed: int = random.SystemRandom().randrange(10_000), folder: Path | None = None) -> None:
    """Run all interrupts and print the table; the project is created if the folder does not exist."""
    print(f"seed {seed}")
    rng = random.Random(seed)
    table = Table(*HEAD)
    with TemporaryDirectory() as scratch:
        project = folder or Path(scratch) / "project"
        if not project.exists():
            make_project(project)
        print(f"undisturbed: {run(project, FLOW):.0f} s", flush=True)
        expected, rows = results(project), []
        for case in CASES:
            rows.append(interrupted(project, case, rng.uniform(*case[3]), expected))
            table.add_row(*rows[-1])
            print(*rows[-1], sep=" | ", flush=True)
    script.show(table)
    if any(float(row[4]) > LIMIT_S or row[5] != "0" or row[6] != "0" or row[-1] != "same" for row in rows):
        sys.exit(f"benchmarks.interrupts: an interrupted command took more than {LIMIT_S} s to end, left a process "
                 "behind, printed a traceback or changed a result; see the table above")


def make_project(folder: Path) -> None:
    """Clone the last commit, and set micro size with a longer `tune` phase."""
    script.clone(folder)
    (folder / ".venv").symlink_to(Path(sys.prefix))
    yaml = YAML()
    values = yaml.load(folder / "presets/micro.yaml")
    values["tune"] |= {"steps": STEPS, "validate_every": STEPS // 4}
    yaml.dump(values, folder / "params.yaml")


def run(folder: Path, command: Sequence[str]) -> float:
    """Run a command without an interrupt and return the duration in seconds. Raises ValueError if the command fails."""
    start = time.monotonic()
    script.run(command, folder, script.project_environment(folder))
    return time.monotonic() - start


def results(folder: Path) -> dict[str, str]:
    """Return a dict from the path of each output of a DVC stage to its digest, including models and scores.

    Outputs that contain run ids or times are left out (see VARIES).
    """
    stages = YAML(typ="safe").load(folder / "dvc.lock")["stages"]
    digests = {out["path"]: out["md5"] for stage in stages.values() for out in stage["outs"]
               if not out["path"].startswith(VARIES)}
    return digests | {"data/metrics.json": (folder / "data/metrics.json").read_text(encoding="utf-8")}


def make_stale(folder: Path, stage: str) -> None:
    """Make DVC run a stage again, by deleting the stage from dvc.lock and from DVC's run cache."""
    yaml = YAML()
    lock = yaml.load(folder / "dvc.lock")
    del lock["stages"][stage]
    yaml.dump(lock, folder / "dvc.lock")
    shutil.rmtree(folder / ".dvc/cache/runs", ignore_errors=True)


def interrupted(folder: Path, case: tuple[str, tuple[str, ...], str | None, tuple[int, int]], moment: float,
                expected: dict[str, str]) -> list[str]:
    """Interrupt a command, run the command again, and return a row of the table.

    The interrupt comes `moment` seconds after the stage of the case started, or after the command started if the case
    has no stage. `expected` holds the digests of the outputs of an undisturbed run.
    """
    kind, command, stage, _ = case
    if stage:
        make_stale(folder, stage)
    terminal = Terminal(folder, command, script.project_environment(folder))
    if stage:
        wait_until(lambda: f"Running stage '{stage}'".encode() in terminal.output, 300)
    time.sleep(moment)
    seconds, num_left, output = terminal.interrupt(kind)
    print(kind, *command, stage, "\n" + output, file=sys.stderr, flush=True)
    next_run_s = run(folder, command)
    return [kind, " ".join(command[-2:]), stage or "before the first", f"{moment:.1f}", f"{seconds:.1f}",
            str(num_left), str(output.count("Traceback")), f"{next_run_s:.0f}",
            ", ".join(path for path, digest in results(folder).items() if digest != expected[path]) or "same"]


if __name__ == "__main__":
    script.main(main)
