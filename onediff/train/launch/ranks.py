"""Runs the launcher of the ranks on this node as a process group, and makes sure that no rank outlives this process.

When the ranks are stopped, they get time to write a checkpoint before they are killed.
"""

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

# Seconds between SIGTERM and SIGKILL, in which ranks write a checkpoint. A longer grace_s in runtime.yaml has priority.
GRACE_S = 120.0
POLL_S = 0.2


@dataclass
class Group:
    """The processes that one command started. The process id of the command, `leader`, is the id of the group."""

    leader: int
    terminated: set[int] = field(default_factory=set)

    def members(self) -> list[psutil.Process]:
        """List the processes of the group that still run."""
        members = []
        for process in psutil.process_iter():
            with suppress(ProcessLookupError, psutil.Error):  # A process may end between listing and inspecting it.
                if os.getpgid(process.pid) == self.leader and process.status() != psutil.STATUS_ZOMBIE:
                    members.append(process)
        return members

    def terminate(self) -> None:
        """Send SIGTERM to each rank that has not received it, or to the launcher if no rank runs on this node.

        Data loader processes get no signal, because their rank needs them until the checkpoint is written. While ranks
        run, DeepSpeed's launcher gets no signal either, because it would kill the ranks after 30 seconds.
        """
        ranks = {process.pid for process in self.members() if _is_rank(process)} or {self.leader}
        for pid in ranks - self.terminated:
            self.terminated.add(pid)
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    def kill(self) -> None:
        """Kill all processes of the group, including processes that start while this method runs."""
        while self.members():
            with suppress(ProcessLookupError):
                os.killpg(self.leader, signal.SIGKILL)
            time.sleep(POLL_S / 4)

    def stop(self, grace_s: float) -> None:
        """Send SIGTERM to the ranks, wait at most `grace_s` seconds for all processes to end, and kill the others."""
        end = time.monotonic() + grace_s
        while self.members() and time.monotonic() < end:
            self.terminate()
            time.sleep(POLL_S)
        self.kill()


def run(command: Sequence[str], environment: Mapping[str, str], *, grace_s: float = GRACE_S) -> tuple[int, bool]:
    """Run the command. Return the exit code, and True if the command was stopped because this process got a signal.

    Signals to this process are passed on to the ranks as SIGTERM. However this process ends, even by SIGKILL, the ranks
    are stopped too.
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
    """Check whether a process is a rank: it has LOCAL_RANK in its environment, but its parent has not.

    The second condition excludes the processes that a rank starts, such as data loaders.
    """
    try:
        parent = process.parent()
        return "LOCAL_RANK" in process.environ() and (parent is None or "LOCAL_RANK" not in parent.environ())
    except psutil.Error:
        return False


@contextmanager
def _guarded(group: Group, grace_s: float) -> Iterator[None]:
    """Run a guard process during the `with` block; the guard stops the group if this process ends inside the block.

    The guard reads from a pipe that this process holds open. The kernel closes the pipe when this process ends.
    """
    command = [sys.executable, "-m", "onediff.train.launch.ranks", str(group.leader), str(grace_s)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as guard:
        assert guard.stdin is not None
        yield
        guard.stdin.write(b"ended")


if __name__ == "__main__":
    # This is the guard process. Empty input means that the process which started the guard has been killed.
    if not sys.stdin.buffer.read():
        Group(int(sys.argv[1])).stop(float(sys.argv[2]))
