"""Processes that a flow starts, and how none of them outlives it."""

from __future__ import annotations

import codecs
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from onediff import interrupts
from onediff.config import load_runtime
from onediff.train.launch.ranks import Group

CODE = Path(__file__).resolve().parent.parent
DVC = (sys.executable, "-m", "dvc")
LOCK = Path(".onediff/pipeline.lock")
_held: set[Path] = set()  # locks that this process holds


def stream(command: Sequence[str], folder: Path = Path()) -> tuple[int, str]:
    """Runs the command in the folder, shows its output as it comes; returns exit status and what it wrote to stdout.

    However this process is interrupted, the command ends with all its children, within runtime.yaml's grace_s.
    """
    grace_s = load_runtime().grace_s
    bin_folder = str(Path(sys.executable).parent)  # `python` and `dvc` of this environment
    env = {**os.environ, "PATH": os.pathsep.join([bin_folder, os.environ.get("PATH", "")]), "PYTHONUNBUFFERED": "1"}
    env[interrupts.FLOW] = str(os.getpid())
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(CODE), env.get("PYTHONPATH")]))
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, env=env, process_group=0)
    assert process.stdout is not None, "asked for a pipe"
    decoder, stdout = codecs.getincrementaldecoder("utf-8")(errors="replace"), []
    try:
        while chunk := os.read(process.stdout.fileno(), 65536):
            stdout.append(decoder.decode(chunk))
            sys.stdout.write(stdout[-1])
            sys.stdout.flush()
        return process.wait(), "".join(stdout)
    finally:
        with interrupts.postponed(interrupts.Stop()):  # a second Ctrl-C must not cut this short
            end(process, grace_s)
        process.stdout.close()


def end(command: subprocess.Popen[bytes], grace_s: float) -> None:
    """Ends a command and all processes below it. Each process of its process group gets SIGTERM; what is still there
    after `grace_s` is killed.

    DVC itself gets no signal: it ends when its stage has ended. Ended while it writes, it leaves half of dvc.lock.
    """
    group, told, family = Group(command.pid), set[int](), set[psutil.Process]()
    if isinstance(command.args, Sequence) and tuple(command.args[: len(DVC)]) == DVC:
        told.add(command.pid)
    last = time.monotonic() + grace_s
    while command.poll() is None and time.monotonic() < last:
        members = group.members()
        family |= {*members, *below(command.pid)}
        send([member for member in members if member.pid not in told], signal.SIGTERM)
        told |= {member.pid for member in members}
        time.sleep(0.1)
    while (left := [process for process in family if runs(process)]) and time.monotonic() < last:
        time.sleep(0.1)
    send(left, signal.SIGKILL)
    group.kill()
    command.wait()  # as a zombie it would hold DVC's lock of the stage


def below(pid: int) -> list[psutil.Process]:
    """All that the process started and that they started, in other sessions too."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def send(family: list[psutil.Process], number: signal.Signals) -> None:
    """The signal to those that still live."""
    for process in family:
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            continue  # went by itself


def runs(process: psutil.Process) -> bool:
    """False also for one that died and whose parent took no notice yet."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextmanager
def alone(lock: Path = LOCK) -> Iterator[None]:
    """Holds the pipeline of a folder for this process: two `dvc repro` at once fail on the files that they share.

    The command line takes the lock before it calls the flow, which takes it again; the second time changes nothing.

    Raises ValueError if another process holds it.
    """
    if lock.absolute() in _held:
        yield
        return
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            pid = file.read().strip() or "unknown"
            raise ValueError(f"{lock}: another run holds the pipeline (process {pid}): wait until it ends, or stop it "
                             f"with 'kill {pid}'") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        _held.add(lock.absolute())
        try:
            yield
        finally:
            _held.discard(lock.absolute())
