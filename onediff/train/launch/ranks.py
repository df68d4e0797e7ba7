"""The ranks of this node: a session of their own, time to write a checkpoint when stopped, none left behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import psutil

from onediff.interrupts import Stop, postponed

# For the checkpoint of ranks, between SIGTERM and SIGKILL, unless runtime.yaml's grace_s is longer. Slurm and
# Kubernetes get the same time.
GRACE_S = 120.0
POLL_S = 0.2


@dataclass
class Group:
    """All processes that one command started, by the number of the process group that it leads."""

    leader: int
    terminated: set[int] = field(default_factory=set)

    def members(self) -> list[psutil.Process]:
        members = []
        for process in psutil.process_iter():
            with suppress(ProcessLookupError, psutil.Error):  # it has ended meanwhile
                if os.getpgid(process.pid) == self.leader and process.status() != psutil.STATUS_ZOMBIE:
                    members.append(process)
        return members

    def terminate(self) -> None:
        """Sends SIGTERM once to each rank, or to the launcher if there is no rank here.

        The loader processes of a rank get none, because the rank needs them to reach its checkpoint, and neither does
        DeepSpeed's launcher, which gives its ranks no more than 30 seconds.
        """
        ranks = {process.pid for process in self.members() if _is_rank(process)} or {self.leader}
        for pid in ranks - self.terminated:
            self.terminated.add(pid)
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    def kill(self) -> None:
        """Kills every process at once, and also those that start meanwhile."""
        while self.members():
            with suppress(ProcessLookupError):
                os.killpg(self.leader, signal.SIGKILL)
            time.sleep(POLL_S / 4)

    def stop(self, grace_s: float) -> None:
        end = time.monotonic() + grace_s
        while self.members() and time.monotonic() < end:
            self.terminate()
            time.sleep(POLL_S)
        self.kill()


def run(command: Sequence[str], environment: Mapping[str, str], *, grace_s: float = GRACE_S) -> tuple[int, bool]:
    """Exit code of the command, and whether it was stopped: a signal to this process reaches the ranks as SIGTERM.

    However this process ends, even by SIGKILL, no rank goes on without it.
    """
    with postponed(Stop()) as stop:
        process = subprocess.Popen(command, env=dict(environment), start_new_session=True)
        group, end = Group(process.pid), float("inf")
        with _guarded(group, grace_s):
            try:
                while process.poll() is None and time.monotonic() < end:
                    if stop.reason:
                        end = min(end, time.monotonic() + grace_s)
                        group.terminate()
                    time.sleep(POLL_S)
            finally:
                group.kill()
        return process.wait(), bool(stop.reason)


def _is_rank(process: psutil.Process) -> bool:
    """A process with a LOCAL_RANK whose parent has none: not one that a rank has forked."""
    try:
        parent = process.parent()
        return "LOCAL_RANK" in process.environ() and (parent is None or "LOCAL_RANK" not in parent.environ())
    except psutil.Error:
        return False


@contextmanager
def _guarded(group: Group, grace_s: float) -> Iterator[None]:
    """Starts a process that waits for our end at the other side of a pipe: however we end, the pipe closes."""
    command = [sys.executable, "-m", "onediff.train.launch.ranks", str(group.leader), str(grace_s)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as guard:
        assert guard.stdin is not None
        yield
        guard.stdin.write(b"ended")


if __name__ == "__main__":  # the guard: stops the group once the pipe on standard input closes without a word
    if not sys.stdin.buffer.read():
        Group(int(sys.argv[1])).stop(float(sys.argv[2]))
