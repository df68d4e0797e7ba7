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
from types import FrameType

import psutil

from onediff.git import configure_dvc
from onediff.stages.command import FLOW

CODE = Path(__file__).resolve().parent.parent
LOCK = Path(".onediff/pipeline.lock")
OWNER = "ONEDIFF_FLOW_PID"  # inherited by Prefect's temporary server: says whose it is
GRACE_S = 60.0  # for a training process to write its checkpoint


def stream(command: Sequence[str], folder: Path = Path()) -> tuple[int, str]:
    """Runs the command in the folder, shows its output as it comes; returns exit status and what it wrote to stdout.

    However this process is interrupted, the command and all its children get SIGTERM, and after GRACE_S SIGKILL.
    """
    bin_folder = str(Path(sys.executable).parent)  # `python` and `dvc` of this environment
    env = {**os.environ, "PATH": os.pathsep.join([bin_folder, os.environ.get("PATH", "")]), "PYTHONUNBUFFERED": "1"}
    env[FLOW] = str(os.getpid())
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(CODE), env.get("PYTHONPATH")]))
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, env=env, process_group=0)
    assert process.stdout is not None, "asked for a pipe"
    decoder, said = codecs.getincrementaldecoder("utf-8")(errors="replace"), []
    try:
        with process.stdout as output:
            while chunk := os.read(output.fileno(), 65536):
                said.append(decoder.decode(chunk))
                sys.stdout.write(said[-1])
                sys.stdout.flush()
        return process.wait(), "".join(said)
    finally:
        if process.poll() is None:
            end(process.pid)


def end(pid: int) -> None:
    """SIGTERM to a process and all below it; what is still there after GRACE_S is killed."""
    try:
        root = psutil.Process(pid)
        family = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    send(family, signal.SIGTERM)
    last = time.monotonic() + GRACE_S
    while (family := [process for process in family if runs(process)]) and time.monotonic() < last:
        time.sleep(0.1)
    send(family, signal.SIGKILL)


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
    """Holds the pipeline of a folder for this process: two `dvc repro` at once fail on what they share.

    Raises ValueError if another run holds it.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(f"{lock}: another run holds the pipeline (process {file.read().strip() or 'unknown'}): "
                             "wait for it or stop it") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def prepare() -> None:
    """For a flow run from the command line: SIGTERM ends it tidily, and servers of runs that were killed are ended."""
    signal.signal(signal.SIGTERM, _leave)
    configure_dvc()
    for process in psutil.process_iter():
        try:
            env = process.environ()
        except psutil.Error:  # gone, or another user's
            continue
        ours = env.get("PREFECT__SERVER_EPHEMERAL") == "1" and env.get("PREFECT_HOME") == os.environ["PREFECT_HOME"]
        if ours and env.get(OWNER) and not psutil.pid_exists(int(env[OWNER])):
            end(process.pid)
    os.environ[OWNER] = str(os.getpid())


def _leave(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)  # an exit, so that atexit ends Prefect's temporary server
