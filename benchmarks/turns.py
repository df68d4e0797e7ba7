"""Contenders that take turns on one machine, a process each.

So what disturbs one disturbs all, and each has its own peak memory. The one whose turn it is not waits at a socket and
uses no processor.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table

SOCKET, CASE = "BENCHMARK_SOCKET", "BENCHMARK_CASE"
PATIENCE_S = 600.0  # until a contender has made its first step, and for each one after


class Ended(Exception):
    """The contender has had all its turns."""


class Turn:
    """A contender's side: called after every unit of work, it waits for the next turn. The first unit is the warm-up.
    """

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {}
        self._file: TextIO | None = None
        self._since = time.perf_counter()

    def __call__(self) -> bool:
        """Whether there is another turn. Of several ranks the first alone asks."""
        if os.environ.get("RANK", "0") != "0":
            return True
        settle()
        seconds = time.perf_counter() - self._since
        if self._file is None:
            connection = socket.socket(socket.AF_UNIX)
            connection.connect(os.environ[SOCKET])
            self._file = connection.makefile("rw")
        self._file.write(json.dumps({"seconds": seconds, "facts": self.facts | {"memory_gib": peak_gib()}}) + "\n")
        self._file.flush()
        more = self._file.readline().strip() == "go"
        self._since = time.perf_counter()
        return more


def settle() -> None:
    """Until the GPU has done what it was given."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def peak_gib() -> float:
    from onediff.train.speed import memory_gib

    return memory_gib()


def contend(work: Callable[[dict[str, Any], Turn], None]) -> None:
    """In a contender's process: its case, until it has had all its turns."""
    from onediff.library_logs import silence_libraries

    silence_libraries()
    try:
        work(json.loads(os.environ[CASE]), Turn())
    except Ended:
        return


# --- the side that gives the turns ------------------------------------------------------------------------------------


@dataclass
class Contender:
    name: str
    module: str
    case: dict[str, Any]
    environment: dict[str, str] = field(default_factory=dict)
    rounds: list[float] = field(default_factory=list)  # seconds of each
    facts: dict[str, Any] = field(default_factory=dict)

    def start(self, folder: Path, threads: int) -> None:
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(folder / f"turns-{len(list(folder.iterdir()))}"))
        self.listener.listen()
        environment = os.environ | {SOCKET: self.listener.getsockname(), CASE: json.dumps(self.case),
                                    "OMP_NUM_THREADS": str(threads)} | self.environment
        self.said = tempfile.TemporaryFile()  # noqa: SIM115  (as long as the process)
        self.process = subprocess.Popen([sys.executable, "-m", self.module], env=environment, stdout=self.said,
                                        stderr=self.said)

    def warm_up(self) -> None:
        """Waits until it has done its first unit. Raises ValueError if it has died."""
        self.listener.settimeout(1.0)
        end = time.monotonic() + PATIENCE_S
        while True:
            try:
                connection = self.listener.accept()[0]
                break
            except TimeoutError:
                if self.process.poll() is not None or time.monotonic() > end:
                    raise self.failure() from None
        connection.settimeout(PATIENCE_S)
        self.file = connection.makefile("rw")
        self.hear()

    def hear(self) -> float:
        """Seconds of the unit that was just done. Raises ValueError if the contender has died."""
        line = self.file.readline()
        if not line:
            self.process.wait()
            raise self.failure()
        told = json.loads(line)
        self.facts = told["facts"]
        return float(told["seconds"])

    def go(self) -> float:
        self.tell("go")
        return self.hear()

    def tell(self, word: str) -> None:
        self.file.write(word + "\n")
        self.file.flush()

    def end(self) -> None:
        self.tell("end")
        self.process.wait(PATIENCE_S)

    def kill(self) -> None:
        self.listener.close()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def failure(self) -> ValueError:
        self.said.seek(0)
        said = self.said.read().decode(errors="replace").strip()
        return ValueError(f"{self.name}: the process ended with code {self.process.poll()}; it said: {said[-1500:]}")


def race(contenders: list[Contender], *, rounds: int, units: int, threads: int, together: bool = True) -> None:
    """`rounds` rounds of `units` units for each: unit by unit in turn, or one contender after the other (where all
    would not fit into a GPU's memory). They start and warm up at once. Raises ValueError if one dies.
    """
    for group in [contenders] if together else [[contender] for contender in contenders]:
        with tempfile.TemporaryDirectory() as folder, ExitStack() as started:
            for contender in group:
                contender.start(Path(folder), threads)
                started.callback(contender.kill)
            for contender in group:
                contender.warm_up()
            for _ in range(rounds):
                took = [[contender.go() for contender in group] for _ in range(units)]
                for contender, seconds in zip(group, zip(*took, strict=True), strict=True):
                    contender.rounds.append(sum(seconds))
            for contender in group:
                contender.end()


def ratios(contender: Contender, peer: Contender, per: str = "rows") -> list[float]:
    """How many times as much as the peer, round by round."""
    share = contender.facts[per] / peer.facts[per]
    return [share * theirs / ours for ours, theirs in zip(contender.rounds, peer.rounds, strict=True)]


def with_range(values: list[float], form: str = ".2f") -> str:
    """median (lowest to highest)"""
    return f"{median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def show(table: Table) -> None:
    Console(width=max(150, Console().width)).print(table)
