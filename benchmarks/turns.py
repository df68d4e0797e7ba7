"""Contenders that take turns on one machine, each in a process.

So what disturbs one contender disturbs all of them, and each has a peak memory that can be read. A contender that is
not at its turn waits at a socket and uses no processor.
"""

import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Client, Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import script
from onediff.library_logs import silence_libraries
from onediff.train.speed import memory_gib

SOCKET, CASE = "BENCHMARK_SOCKET", "BENCHMARK_CASE"
TIMEOUT_S = 600.0  # until a contender has made its first step, and for each later one


class Ended(Exception):
    """The contender has had all its turns."""


class Turn:
    """A contender's side: called after every unit of work, it waits for the next turn. The first unit is the warm-up.
    """

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {}
        self._connection: Connection | None = None
        self._start = time.perf_counter()

    def __call__(self, *_: Any) -> None:
        """Raises Ended if there is no other turn. Of several ranks only the first one waits."""
        if os.environ.get("RANK", "0") != "0":
            return
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self._start
        self._connection = self._connection or Client(os.environ[SOCKET])
        self._connection.send((seconds, self.facts | {"memory_gib": memory_gib()}))
        if not self._connection.recv():
            raise Ended
        self._start = time.perf_counter()


def run_script(command: Callable[[], Any], contender: Callable[[dict[str, Any], Turn], None] | None = None) -> None:
    """The command; or, in the process of a contender, the case of that contender until it has had all its turns."""
    if contender and CASE in os.environ:
        silence_libraries()
        with suppress(Ended):
            contender(json.loads(os.environ[CASE]), Turn())
        return
    script.main(command)


# --- the side that gives the turns ------------------------------------------------------------------------------------


@dataclass
class Contender:
    name: str
    module: str
    case: dict[str, Any]
    environment: dict[str, str] = field(default_factory=dict)
    rounds: list[float] = field(default_factory=list)  # seconds of each
    facts: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def running(self, address: Path, threads: int) -> Iterator[None]:
        """Starts the process, and kills it at the end if it still runs."""
        environment = os.environ | {SOCKET: str(address), CASE: json.dumps(self.case),
                                    "OMP_NUM_THREADS": str(threads)} | self.environment
        with tempfile.TemporaryFile() as self.output, socket.socket(socket.AF_UNIX) as self.listener:
            self.listener.bind(str(address))
            self.listener.listen()
            self.process = subprocess.Popen([sys.executable, "-m", self.module], env=environment, stdout=self.output,
                                            stderr=self.output)
            try:
                yield
            finally:
                self.process.kill()
                self.process.wait()

    def warm_up(self) -> None:
        """Waits until the first unit is done. Raises ValueError if the process has died."""
        deadline = time.monotonic() + TIMEOUT_S
        while not select.select([self.listener], [], [], 1.0)[0]:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise self.failure()
        self.connection = Connection(self.listener.accept()[0].detach())
        self.receive()

    def receive(self) -> float:
        """Seconds of the unit that was just done. Raises ValueError if the process has died."""
        try:
            if not self.connection.poll(TIMEOUT_S):
                raise self.failure()
            seconds, self.facts = self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.wait()
            raise self.failure() from None
        return float(seconds)

    def take_turn(self) -> float:
        self.connection.send(True)
        return self.receive()

    def failure(self) -> ValueError:
        self.output.seek(0)
        output = self.output.read().decode(errors="replace").strip()
        return ValueError(f"{self.name}: the process ended with code {self.process.poll()}; its output: "
                          f"{output[-1500:]}")


def race(contenders: list[Contender], *, rounds: int, units: int, threads: int, together: bool = True) -> None:
    """`rounds` rounds of `units` units for each: unit by unit in turn, or one contender after the other (where all
    would not fit into a GPU's memory). They start and warm up at once. Raises ValueError if one dies.
    """
    for group in [contenders] if together else [[contender] for contender in contenders]:
        with tempfile.TemporaryDirectory() as folder, ExitStack() as started:
            for number, contender in enumerate(group):
                started.enter_context(contender.running(Path(folder, str(number)), threads))
            for contender in group:
                contender.warm_up()
            for _ in range(rounds):
                seconds = [[contender.take_turn() for contender in group] for _ in range(units)]
                for contender, column in zip(group, zip(*seconds, strict=True), strict=True):
                    contender.rounds.append(sum(column))
            for contender in group:
                contender.connection.send(False)
                contender.process.wait(TIMEOUT_S)


def ratios(contender: Contender, peer: Contender) -> list[float]:
    """How many times as many rows per second as the peer, round by round."""
    share = contender.facts["rows"] / peer.facts["rows"]
    return [share * theirs / ours for ours, theirs in zip(contender.rounds, peer.rounds, strict=True)]


def with_range(values: list[float], form: str = ".2f") -> str:
    """median (lowest to highest)"""
    return f"{median(values):{form}} ({min(values):{form}} to {max(values):{form}})"
