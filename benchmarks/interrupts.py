"""Interrupt runs at random moments, start them again, and compare what they make with an undisturbed run's results.

    python -m benchmarks.interrupts [SEED [FOLDER]]

It makes a project of micro size in FOLDER, or in a temporary folder, with a `tune` of 200 steps, and runs it once
undisturbed. Each interrupt then makes one stage stale, starts a command in a terminal of its own, and ends it in one of
three ways: Ctrl-C, SIGTERM to the command alone, or closing the terminal. The table says how long it took until no
process was left, and whether the same command then made the same bytes.
"""

from __future__ import annotations

import os
import pty
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parent.parent
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
    """A command in a terminal of its own."""

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
        while not self.closing:
            if select.select([self.screen], [], [], 0.1)[0]:
                try:
                    self.output += os.read(self.screen, 65536)
                except OSError:  # no process has the terminal any more
                    return

    def interrupt(self, kind: str) -> tuple[float, int, str]:
        """Seconds until no process was left, how many were left after a minute, and what was printed meanwhile."""
        seen = len(self.output)
        self._end(kind)
        seconds = wait_until(lambda: not self.processes(), 60)
        left = self.processes()
        for process in left:
            process.kill()
        os.waitpid(self.pid, 0)
        return seconds, len(left), self.output[seen:].decode(errors="replace")

    def _end(self, kind: str) -> None:
        if kind == "SIGINT":
            os.write(self.screen, b"\x03")
        elif kind == "SIGTERM":
            os.kill(self.pid, signal.SIGTERM)
        else:
            self.closing = True  # while a thread reads from it, it would not be closed
            self.reader.join()
            os.close(self.screen)

    def processes(self) -> list[psutil.Process]:
        """All that live of what the command started."""
        return [process for process in psutil.process_iter() if self._started(process)]

    def _started(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:  # gone meanwhile, or of another user
            return False


def wait_until(true: Callable[[], object], limit_s: float) -> float:
    """Seconds until it was true, or `limit_s`."""
    start = time.monotonic()
    while not true() and time.monotonic() - start < limit_s:
        time.sleep(0.1)
    return time.monotonic() - start


def environment(folder: Path) -> dict[str, str]:
    bin_folder = str(Path(sys.executable).parent)
    return {**os.environ, "PATH": os.pathsep.join([bin_folder, os.environ["PATH"]]), "PYTHONPATH": str(folder),
            "HF_HUB_OFFLINE": "1", "DVC_NO_ANALYTICS": "1"}


def make_project(folder: Path) -> None:
    """A clone of this checkout's last commit at micro size, with a longer `tune`."""
    subprocess.run(["git", "clone", "-q", str(ROOT), str(folder)], check=True)
    (folder / ".venv").symlink_to(Path(sys.prefix))
    yaml = YAML()
    values = yaml.load((folder / "presets/micro.yaml").read_text(encoding="utf-8"))
    values["tune"] |= {"steps": STEPS, "validate_every": STEPS // 4}
    yaml.dump(values, folder / "params.yaml")


def run(folder: Path, command: tuple[str, ...]) -> float:
    """Seconds of an undisturbed run. Raises ValueError with the end of its output if it fails."""
    start = time.monotonic()
    done = subprocess.run(command, cwd=folder, env=environment(folder), text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise ValueError(f"{' '.join(command)} ended with {done.returncode}: {done.stdout[-2000:]}")
    return time.monotonic() - start


def results(folder: Path) -> dict[str, str]:
    """The digest of everything that the stages made, model folders and scores included."""
    stages = YAML(typ="safe").load((folder / "dvc.lock").read_text(encoding="utf-8"))["stages"]
    digests = {out["path"]: out["md5"] for stage in stages.values() for out in stage["outs"]
               if not out["path"].startswith(VARIES)}
    return digests | {"data/metrics.json": (folder / "data/metrics.json").read_text(encoding="utf-8")}


def make_stale(folder: Path, stage: str) -> None:
    """As if the stage had never run: no entry in dvc.lock, nothing in DVC's run cache."""
    lock, yaml = folder / "dvc.lock", YAML()
    values: dict[str, Any] = yaml.load(lock.read_text(encoding="utf-8"))
    del values["stages"][stage]
    yaml.dump(values, lock)
    shutil.rmtree(folder / ".dvc/cache/runs", ignore_errors=True)


def interrupted(folder: Path, case: tuple[str, tuple[str, ...], str | None, tuple[int, int]], moment: float,
                expected: dict[str, str]) -> list[str]:
    """One row of the table."""
    kind, command, stage, _ = case
    if stage:
        make_stale(folder, stage)
    terminal = Terminal(folder, command, environment(folder))
    if stage:
        wait_until(lambda: f"Running stage '{stage}'".encode() in terminal.output, 300)
    time.sleep(moment)
    seconds, left, printed = terminal.interrupt(kind)
    print(kind, *command, stage, "\n" + printed, file=sys.stderr, flush=True)
    again = run(folder, command)
    return [kind, " ".join(command[-2:]), stage or "before the first", f"{moment:.1f}", f"{seconds:.1f}",
            str(left), str(printed.count("Traceback")), f"{again:.0f}",
            ", ".join(path for path, digest in results(folder).items() if digest != expected[path]) or "same"]


def show(rows: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")


def main() -> None:
    seed = int(sys.argv[1]) if sys.argv[1:] else random.SystemRandom().randrange(10_000)
    dice = random.Random(seed)
    print(f"seed {seed}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(sys.argv[2]) if sys.argv[2:] else Path(scratch) / "project"
        if not folder.exists():
            make_project(folder)
        print(f"undisturbed: {run(folder, FLOW):.0f} s", flush=True)
        expected, rows = results(folder), []
        for case in CASES:
            rows.append(interrupted(folder, case, dice.uniform(*case[3]), expected))
            print(*rows[-1], sep=" | ", flush=True)
    show([HEAD, *rows])
    if any(float(row[4]) > LIMIT_S or row[5] != "0" or row[6] != "0" or row[-1] != "same" for row in rows):
        sys.exit(f"an interrupt took more than {LIMIT_S} s, left a process, printed a traceback or changed a result")


if __name__ == "__main__":
    main()
