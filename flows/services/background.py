"""Processes that outlive the shell: each has a session of its own, and a file with its process id and start time."""

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

GRACE_S = 60.0  # before SIGKILL; a training below a worker writes its checkpoint
MARK = "ONEDIFF_SERVICE"  # variable of a service and of every process that it starts
SHOWN_LINES = 15  # of a log, when something failed
STOP_SIGNALS = {"postgres": signal.SIGINT}  # its fast shutdown: it disconnects clients and writes all data


@dataclass(frozen=True)
class Service:
    """A process and the name under which it runs. `check` queries it, and raises ValueError if it does not answer."""

    name: str
    command: list[str]
    env: Mapping[str, str]
    cwd: Path
    address: str
    port: int | None
    check: Callable[[], object]

    def problem(self) -> str | None:
        """Why the service does not answer, or None."""
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
    """The process that was started under the name, unless it has ended and its process id belongs to another."""
    try:
        record = json.loads(pid_file(folder, name).read_text(encoding="utf-8"))
        process = psutil.Process(record["pid"])
        same = abs(process.create_time() - record["born"]) < 1
    except (FileNotFoundError, psutil.NoSuchProcess):
        return None
    return process if same and is_alive(process) else None


def family(folder: Path, name: str) -> list[psutil.Process]:
    """The living processes that were started under the name, also after the first of them was killed: those in its
    session, and those that inherited its mark.
    """
    alive = [process for process in psutil.process_iter() if is_alive(process)]
    leader = None
    if pid_file(folder, name).exists():
        leader = int(json.loads(pid_file(folder, name).read_text(encoding="utf-8"))["pid"])
        if running(folder, name) is None and any(process.pid == leader for process in alive):
            leader = None  # the process id belongs to another process now

    def belongs(process: psutil.Process) -> bool:
        try:
            return os.getsid(process.pid) == leader or process.environ().get(MARK) == _mark(folder, name)
        except (OSError, psutil.Error):  # it has ended, or belongs to another user
            return False

    return list(filter(belongs, alive))


def launch(service: Service, folder: Path) -> None:
    """Starts the process in a session of its own; its output goes to the end of its log."""
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
    """Raises ValueError with the last lines of the log if it ends, or does not answer within the time."""
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
    """Ends all processes that were started under the name; returns whether there were any. The first process gets the
    service's stop signal, then the others SIGTERM, then SIGKILL; each of the two waits takes `grace_s` at most.
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
    """Raises ValueError with the cure if a process listens on the port. `key` names the port in runtime.yaml."""
    try:
        socket.create_server(("127.0.0.1", port)).close()  # a server that just ended does not count
    except OSError:
        raise ValueError(f"port {port} is in use: end what listens there, or set another one in runtime.yaml, "
                         f"services: {{{key}: {port + 1000}}}") from None


def memory_mb(folder: Path, name: str) -> int:
    """Memory of the service and its descendants; pages that several of its processes share count once."""
    total = 0
    for process in family(folder, name):
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            total += process.memory_full_info().pss
    return round(total / 2**20)
