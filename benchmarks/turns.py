"""Runs the contenders of a benchmark in turn, each in a separate process on one machine.

Turns make the comparison fair, because other load on the machine slows all contenders equally. Separate processes have
separate peak memory. A contender that waits for its next turn reads from a socket and uses no processor time.
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
TIMEOUT_S = 600.0  # longest time of a contender for the start with the first unit of work, and for each later unit


class Ended(Exception):
    """Raised in a contender when no turn is left."""


class Turn:
    """A callable with which a contender reports a finished unit of work and waits for the next turn.

    The first unit is the warm-up. Each report to the main process contains `facts`; a contender can add values to it.
    """

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {}
        self._connection: Connection | None = None
        self._start = time.perf_counter()

    def __call__(self, *_: Any) -> None:
        """Report the finished unit and wait for the next turn. Raises Ended if no turn is left.

        With several ranks, only rank 0 reports and waits.
        """
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
    """Run `command` with the options of the command line; in the process of a contender, run `contender` instead.

    `contender` runs until no turn is left.
    """
    if contender and CASE in os.environ:
        silence_libraries()
        with suppress(Ended):
            contender(json.loads(os.environ[CASE]), Turn())
        return
    script.main(command)


@dataclass
class Contender:
    """One contender as the main process sees it: its case, its process and its results.

    `module` is the Python module that the process runs; `rounds` gets the seconds of each round.
    """

    name: str
    module: str
    case: dict[str, Any]
    environment: dict[str, str] = field(default_factory=dict)
    rounds: list[float] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def running(self, address: Path, threads: int) -> Iterator[None]:
        """Start the process of the contender, and kill the process at the end of the `with` block if it still runs."""
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
        """Wait until the contender has finished its first unit of work. Raises ValueError if the process ended."""
        deadline = time.monotonic() + TIMEOUT_S
        while not select.select([self.listener], [], [], 1.0)[0]:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise self.failure()
        self.connection = Connection(self.listener.accept()[0].detach())
        self.receive()

    def receive(self) -> float:
        """Wait for the next report of the contender and return the seconds of its unit of work.

        Raises ValueError if the process ended.
        """
        try:
            if not self.connection.poll(TIMEOUT_S):
                raise self.failure()
            seconds, self.facts = self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.wait()
            raise self.failure() from None
        return float(seconds)

    def take_turn(self) -> float:
        """Let the contender do one unit of work, and return its seconds."""
        self.connection.send(True)
        return self.receive()

    def failure(self) -> ValueError:
        """Return the error for a contender whose process ended or did not answer, with the end of its output."""
        self.output.seek(0)
        output = self.output.read().decode(errors="replace").strip()
        code = self.process.poll()
        reason = f"did not answer for {TIMEOUT_S:.0f} s" if code is None else f"ended with code {code}"
        return ValueError(f"{self.name}: the process {reason}; its output: {output[-1500:]}")


def race(contenders: list[Contender], *, rounds: int, units: int, threads: int, together: bool = True) -> None:
    """Run all contenders, and add the seconds of each round to the list `rounds` of each contender.

    In a round, each contender does `units` units of work. With `together`, all contenders start at once and take turns
    after each unit. Otherwise they run one after the other, because the memory of a GPU does not hold all of them.
    Raises ValueError if the process of a contender ends.
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
    """Return for each round the rows per second of the contender divided by the rows per second of the peer."""
    share = contender.facts["rows"] / peer.facts["rows"]
    return [share * theirs / ours for ours, theirs in zip(contender.rounds, peer.rounds, strict=True)]


def with_range(values: list[float], form: str = ".2f") -> str:
    """Format values as `median (lowest to highest)`."""
    return f"{median(values):{form}} ({min(values):{form}} to {max(values):{form}})"
