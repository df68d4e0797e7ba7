"""The ranks of this node: a session of their own, time to write a checkpoint when stopped, none left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import psutil

from onediff.interrupts import Stop, postponed

# For the checkpoint of ranks, between SIGTERM and SIGKILL, unless runtime.yaml's grace_s is longer. Slurm and
# Kubernetes get the same time.
GRACE_S = 120.0
POLL_S = 0.2


@dataclass
class Group:
    """All processes that one command started, by the number of the process group it leads."""

    leader: int

    def members(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if os.getpgid(process.pid) == self.leader and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (ProcessLookupError, psutil.Error):  # gone meanwhile
                continue
        return found

    def terminate(self, told: set[int]) -> None:
        """SIGTERM to each rank not yet `told`, or to the launcher if there is no rank here.

        Not to a rank's own loader processes, without which it could not reach its checkpoint, and not to DeepSpeed's
        launcher, which gives its ranks no more than 30 seconds.
        """
        ranks = [process.pid for process in self.members() if _is_rank(process)] or [self.leader]
        for pid in set(ranks) - told:
            told.add(pid)
            _send(pid, signal.SIGTERM)

    def kill(self) -> None:
        """Every process at once, those started meanwhile too."""
        while self.members():
            try:
                os.killpg(self.leader, signal.SIGKILL)
            except ProcessLookupError:
                return
            time.sleep(POLL_S / 4)

    def stop(self, grace_s: float) -> None:
        told: set[int] = set()
        end = time.monotonic() + grace_s
        while self.members() and time.monotonic() < end:
            self.terminate(told)
            time.sleep(POLL_S)
        self.kill()


def run(command: Sequence[str], environment: Mapping[str, str], *, grace_s: float = GRACE_S) -> tuple[int, bool]:
    """Exit code of the command, and whether it was stopped: a signal to this process reaches the ranks as SIGTERM.

    However this process ends, SIGKILL included, no rank goes on without it.
    """
    with postponed(Stop()) as stop:
        process = subprocess.Popen(command, env=dict(environment), start_new_session=True)
        group, told, end = Group(process.pid), set[int](), float("inf")
        with _guarded(group, grace_s):
            try:
                while (code := process.poll()) is None and time.monotonic() < end:
                    if stop.reason:
                        end = min(end, time.monotonic() + grace_s)
                        group.terminate(told)
                    time.sleep(POLL_S)
            finally:
                group.kill()
        return (process.wait() if code is None else code), bool(stop.reason)


def _is_rank(process: psutil.Process) -> bool:
    """A process with a LOCAL_RANK whose parent has none: not one that a rank has forked."""
    try:
        parent = process.parent()
        return "LOCAL_RANK" in process.environ() and (parent is None or "LOCAL_RANK" not in parent.environ())
    except psutil.Error:
        return False


def _send(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


@contextmanager
def _guarded(group: Group, grace_s: float) -> Iterator[None]:
    """A process that waits for our end at the other side of a pipe, which no way of dying leaves open."""
    command = [sys.executable, "-m", "onediff.train.launch.ranks", str(group.leader), str(grace_s)]
    guard = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    assert guard.stdin is not None
    try:
        yield
        guard.stdin.write(b"ended")
    finally:
        guard.stdin.close()
        guard.wait()


def guard(leader: int, grace_s: float) -> None:
    """Stops the group once the pipe on standard input closes without a word."""
    if not sys.stdin.buffer.read():
        Group(leader).stop(grace_s)


if __name__ == "__main__":
    guard(int(sys.argv[1]), float(sys.argv[2]))
