"""Background processes that outlive the shell. Each has its own session, and a file with process id and start time."""

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from flows.processes import is_alive, send_signal, wait_for_end
from onediff.files import write_text

GRACE_S = 60.0  # seconds between SIGTERM and SIGKILL, so that training on a worker can write its checkpoint
# environment variable that marks all processes of a service, because child processes inherit it
MARK = "ONEDIFF_SERVICE"
SHOWN_LINES = 15  # maximum number of lines of a log that an error message shows
# After SIGINT, PostgreSQL disconnects its clients, writes all data and ends.
STOP_SIGNALS = {"postgres": signal.SIGINT}


@dataclass(frozen=True)
class Service:
    """A background process and its name. `check` queries the process and raises ValueError if it does not answer."""

    name: str
    command: list[str]
    env: Mapping[str, str]
    cwd: Path
    address: str
    port: int | None
    check: Callable[[], object]

    def problem(self) -> str | None:
        """Return the reason why the service does not answer, or None if it answers."""
        try:
            self.check()
        except ValueError as error:
            return str(error)
        return None


def pid_file(folder: Path, name: str) -> Path:
    return folder / "run" / f"{name}.json"


def log_file(folder: Path, name: str) -> Path:
    return folder / "logs" / f"{name}.log"


def running(folder: Path, name: str) -> psutil.Process | None:
    """Return the first process of the service `name`, or None if it has ended or was never started.

    The recorded start time shows whether another process now has the recorded process id.
    """
    try:
        record = json.loads(pid_file(folder, name).read_text(encoding="utf-8"))
        process = psutil.Process(record["pid"])
        same = abs(process.create_time() - record["born"]) < 1
    except (FileNotFoundError, psutil.NoSuchProcess):
        return None
    return process if same and is_alive(process) else None


def family(folder: Path, name: str) -> list[psutil.Process]:
    """Return the running processes of a service: its first process and all its descendants.

    They are recognised by their session or by the environment variable MARK that they inherit, so they are also found
    after the first process was killed.
    """
    alive = [process for process in psutil.process_iter() if is_alive(process)]
    leader = None
    if pid_file(folder, name).exists():
        leader = int(json.loads(pid_file(folder, name).read_text(encoding="utf-8"))["pid"])
        if running(folder, name) is None and any(process.pid == leader for process in alive):
            leader = None  # Another process has this process id now.

    def belongs(process: psutil.Process) -> bool:
        try:
            return os.getsid(process.pid) == leader or process.environ().get(MARK) == _mark(folder, name)
        except (OSError, psutil.Error):  # The process has ended, or belongs to another user.
            return False

    return list(filter(belongs, alive))


def launch(service: Service, folder: Path) -> None:
    """Start the service in a new session, and append its output to its log."""
    log = log_file(folder, service.name)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab", buffering=0) as output:
        os.fchmod(output.fileno(), 0o600)
        output.write(f"== {time.strftime('%Y-%m-%d %H:%M:%S')} {service.name} starts\n".encode())
        process = subprocess.Popen(service.command, cwd=service.cwd, stdin=subprocess.DEVNULL, stdout=output,
                                   stderr=subprocess.STDOUT, start_new_session=True,
                                   env={**service.env, MARK: _mark(folder, service.name)})
    born = psutil.Process(process.pid).create_time()
    write_text(pid_file(folder, service.name), json.dumps({"pid": process.pid, "born": born}))


def _mark(folder: Path, name: str) -> str:
    return f"{folder.absolute()}:{name}"


def wait_until_it_answers(service: Service, folder: Path, limit_s: float) -> None:
    """Wait until the service answers, at most `limit_s` seconds.

    Raises ValueError with the last lines of the log if the service ends or does not answer in time.
    """
    deadline = time.monotonic() + limit_s
    while problem := service.problem():
        ended = running(folder, service.name) is None
        if ended or time.monotonic() > deadline:
            why = "ended at once" if ended else f"does not answer after {limit_s:.0f} s ({problem})"
            log = log_file(folder, service.name)
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
            raise ValueError("\n  | ".join([f"{service.name} {why}; {log} ends with:", *lines[-SHOWN_LINES:]]))
        time.sleep(0.2)


def end(folder: Path, name: str, *, grace_s: float = GRACE_S) -> bool:
    """End all processes of a service; return whether there were any.

    The first process gets the service's stop signal. Then all processes that still run get SIGTERM, and finally
    SIGKILL. Each wait between two signals takes at most `grace_s` seconds.
    """
    members, leader = family(folder, name), running(folder, name)
    if leader is not None:
        send_signal([leader], STOP_SIGNALS.get(name, signal.SIGTERM))
        wait_for_end([leader], grace_s)
    for number in (signal.SIGTERM, signal.SIGKILL):
        send_signal(wait_for_end(members, 0), number)
        wait_for_end(members, grace_s)
    pid_file(folder, name).unlink(missing_ok=True)
    return bool(members)


def check_port_is_free(port: int, key: str) -> None:
    """Raise ValueError if a process listens on the port. `key` is the name of the port's setting in runtime.yaml."""
    try:
        socket.create_server(("127.0.0.1", port)).close()  # This also works for the port of a server that just ended.
    except OSError:
        raise ValueError(f"port {port} is in use: stop the process that listens there, or set another port in "
                         f"runtime.yaml, services: {{{key}: {port + 1000}}}") from None


def memory_mb(folder: Path, name: str) -> int:
    """Return the memory of the service's processes in MiB; pages that several of the processes share count once."""
    total = 0
    for process in family(folder, name):
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            total += process.memory_full_info().pss
    return round(total / 2**20)
