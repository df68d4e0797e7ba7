"""Interrupt runs at random moments, start them again, and compare what they make with an undisturbed run's results.

    python -m benchmarks.interrupts [--seed SEED] [--folder FOLDER]

It makes a project of micro size in FOLDER or in a temporary folder, with a `tune` of 200 steps, and runs it once
undisturbed. Each interrupt then makes one stage stale, starts a command in a new terminal, and ends it in one of
three ways: Ctrl-C, SIGTERM to the command alone, or closing the terminal. The table says how long it took until no
process was left, and whether the same command then made the same bytes.
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
MAKE = ("make", "-o", ".venv/.installed", "run")  # the project shares this environment, which is set up already
CASES = (  # signal, command, the stage that it runs, the seconds from the start of the stage until the signal
    ("SIGINT", MAKE, "tune", (4, 25)), ("SIGTERM", FLOW, "tune", (4, 25)), ("SIGHUP", MAKE, "tune", (4, 25)),
    ("SIGINT", REPRO, "tune", (4, 25)), ("SIGTERM", MAKE, "tune", (4, 25)), ("SIGHUP", REPRO, "tune", (4, 25)),
    ("SIGINT", FLOW, "synthesize@scenes", (0, 6)), ("SIGTERM", REPRO, "build", (0, 8)),
    ("SIGHUP", FLOW, "align", (0, 10)), ("SIGINT", MAKE, "caption", (0, 10)), ("SIGTERM", FLOW, "score", (0, 10)),
    ("SIGINT", FLOW, None, (0, 15)))  # None: before the first stage
HEAD = ["signal", "command", "stage", "after s", "ended in s", "processes left", "tracebacks", "next run s", "bytes"]
VARIES = ("data/runs/", "data/curves/", "data/report.html", "data/figures")  # run ids and seconds, and who shows them


class Terminal:
    """A command in a new terminal."""

    def __init__(self, folder: Path, command: Sequence[str], env: Mapping[str, str]) -> None:
        self.output = bytearray()
        self.mark = f"{os.getpid()}-{time.monotonic()}"
        self.pid, self.screen = pty.fork()
        if self.pid == 0:
            for number in (signal.SIGINT, signal.SIGHUP):  # ignored where this benchmark runs in the background
                signal.signal(number, signal.SIG_DFL)
            os.chdir(folder)
            os.execvpe(command[0], command, {**env, MARK: self.mark})
        self.closing = False
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        with suppress(OSError):  # raised when no process has the terminal any more
            while not self.closing:
                if select.select([self.screen], [], [], 0.1)[0]:
                    self.output += os.read(self.screen, 65536)

    def interrupt(self, kind: str) -> tuple[float, int, str]:
        """Seconds until no process was left, how many were left after a minute, and what was printed meanwhile."""
        start = len(self.output)
        if kind == "SIGINT":
            os.write(self.screen, b"\x03")
        elif kind == "SIGTERM":
            os.kill(self.pid, signal.SIGTERM)
        else:
            self.closing = True  # while a thread reads from it, it would not be closed
            self.reader.join()
            os.close(self.screen)
        seconds = wait_until(lambda: not self.processes(), 60)
        left = self.processes()
        for process in left:
            process.kill()
        os.waitpid(self.pid, 0)
        return seconds, len(left), self.output[start:].decode(errors="replace")

    def processes(self) -> list[psutil.Process]:
        """The live processes that the command started."""
        live = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):  # it has ended, or belongs to another user
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    live.append(process)
        return live


def wait_until(condition: Callable[[], object], limit_s: float, *, every_s: float = 0.1) -> float:
    """Seconds until the condition was true, or `limit_s`."""
    start = time.monotonic()
    while not condition() and time.monotonic() - start < limit_s:
        time.sleep(every_s)
    return time.monotonic() - start


def main(seed: int = random.SystemRandom().randrange(10_000), folder: Path | None = None) -> None:
    """The table of all interrupts, in a project that is made unless the folder has it."""
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
        sys.exit(f"an interrupt took more than {LIMIT_S} s, left a process, printed a traceback or changed a result")


def make_project(folder: Path) -> None:
    """A clone of this checkout's last commit at micro size, with a longer `tune`."""
    script.clone(folder)
    (folder / ".venv").symlink_to(Path(sys.prefix))
    yaml = YAML()
    values = yaml.load(folder / "presets/micro.yaml")
    values["tune"] |= {"steps": STEPS, "validate_every": STEPS // 4}
    yaml.dump(values, folder / "params.yaml")


def run(folder: Path, command: Sequence[str]) -> float:
    """Seconds of an undisturbed run. Raises ValueError with the end of its output if it fails."""
    start = time.monotonic()
    script.run(command, folder, script.project_environment(folder))
    return time.monotonic() - start


def results(folder: Path) -> dict[str, str]:
    """The digest of everything that the stages made, model folders and scores included."""
    stages = YAML(typ="safe").load(folder / "dvc.lock")["stages"]
    digests = {out["path"]: out["md5"] for stage in stages.values() for out in stage["outs"]
               if not out["path"].startswith(VARIES)}
    return digests | {"data/metrics.json": (folder / "data/metrics.json").read_text(encoding="utf-8")}


def make_stale(folder: Path, stage: str) -> None:
    """As if the stage had never run: no entry in dvc.lock, nothing in DVC's run cache."""
    yaml = YAML()
    lock = yaml.load(folder / "dvc.lock")
    del lock["stages"][stage]
    yaml.dump(lock, folder / "dvc.lock")
    shutil.rmtree(folder / ".dvc/cache/runs", ignore_errors=True)


def interrupted(folder: Path, case: tuple[str, tuple[str, ...], str | None, tuple[int, int]], moment: float,
                expected: dict[str, str]) -> list[str]:
    """One row of the table."""
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
