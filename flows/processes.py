"""Start the processes of a flow, and end all of them when the flow ends."""

import codecs
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil

from onediff import interrupts
from onediff.config import load_runtime
from onediff.files import refusing_lock
from onediff.train.launch.ranks import Group

DVC = (sys.executable, "-m", "dvc")
LOCK = Path(".onediff/pipeline.lock")
_held_locks: set[Path] = set()  # by this process


def code_env() -> dict[str, str]:
    """Return environment variables that let child processes use this Python environment and the code of this checkout.

    They also switch off the buffering of output.
    """
    paths = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH")]
    return {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
            "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}


def stream(command: Sequence[str], folder: Path = Path()) -> tuple[int, str]:
    """Run a command in the folder, print its output while it runs, and return its exit status and its stdout.

    If this process is interrupted, the command and all its children end within `grace_s` seconds (see runtime.yaml).
    """
    grace_s = load_runtime().grace_s
    env = os.environ | code_env() | {interrupts.FLOW: str(os.getpid())}
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, env=env, process_group=0)
    assert process.stdout is not None, "stdout must be a pipe"
    decoder, stdout = codecs.getincrementaldecoder("utf-8")(errors="replace"), []
    try:
        while chunk := os.read(process.stdout.fileno(), 65536):
            stdout.append(decoder.decode(chunk))
            sys.stdout.write(stdout[-1])
            sys.stdout.flush()
        return process.wait(), "".join(stdout)
    finally:
        with interrupts.postponed(interrupts.Stop()):  # A second Ctrl-C must not interrupt the clean-up.
            end(process, grace_s)
        process.stdout.close()


def end(command: subprocess.Popen[bytes], grace_s: float) -> None:
    """Send SIGTERM to a command and its descendants, and SIGKILL to those that still run after `grace_s` seconds.

    The DVC process itself gets no SIGTERM, because it ends when its stage has ended, and a SIGTERM while it writes
    dvc.lock would leave an incomplete file.
    """
    group, signalled, family = Group(command.pid), set[int](), set[psutil.Process]()
    if isinstance(command.args, Sequence) and tuple(command.args[: len(DVC)]) == DVC:
        signalled.add(command.pid)
    deadline = time.monotonic() + grace_s
    while command.poll() is None and time.monotonic() < deadline:
        members = group.members()
        family |= {*members, *psutil.Process(command.pid).children(recursive=True)}
        send_signal([member for member in members if member.pid not in signalled], signal.SIGTERM)
        signalled |= {member.pid for member in members}
        time.sleep(0.1)
    send_signal(wait_for_end(list(family), deadline - time.monotonic()), signal.SIGKILL)
    group.kill()
    # Read the exit status, because DVC takes a zombie for a running process and would keep the lock of its stage.
    command.wait()


def run_tool(command: Sequence[str], failure: str, *, env: Mapping[str, str], folder: Path = Path()) -> str:
    """Run a command and return its stdout.

    Raises ValueError with the text `failure` and the end of the command's output if the command fails.
    """
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"{failure}: {' '.join((done.stderr or done.stdout).split())[-500:]}")
    return done.stdout


def send_signal(processes: list[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):  # the process has ended
            process.send_signal(number)


def is_alive(process: psutil.Process) -> bool:
    """Return whether the process runs. A zombie, whose parent has not read its exit status yet, does not run."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for_end(processes: list[psutil.Process], limit_s: float) -> list[psutil.Process]:
    """Wait until the processes have ended, at most `limit_s` seconds; return those that still run."""
    deadline = time.monotonic() + limit_s
    while (alive := [process for process in processes if is_alive(process)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return alive


@contextmanager
def pipeline_lock(path: Path = LOCK) -> Iterator[None]:
    """Context manager that holds the lock of the pipeline, which allows only one `dvc repro` in a folder at a time.

    The command line acquires the lock before it calls the flow; acquiring it again in the flow has no effect. Raises
    ValueError if another process holds the lock.
    """
    if path.absolute() in _held_locks:
        yield
        return
    with ExitStack() as stack:
        try:
            stack.enter_context(refusing_lock(path, "{holder}"))
        except ValueError as holder:  # "PID on HOST"
            pid = str(holder).partition(" ")[0]
            raise ValueError(f"{path}: another run holds the pipeline (process {pid}): wait until it ends, or stop it "
                             f"with 'kill {pid}'") from None
        _held_locks.add(path.absolute())
        stack.callback(_held_locks.discard, path.absolute())
        yield
