"""Processes that outlive the shell: one session each, known by a file with pid and time of birth."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from flows.processes import runs, send

GRACE_S = 60.0  # to end tidily; a training below a worker writes its checkpoint
MARK = "ONEDIFF_SERVICE"
SHOWN_LINES = 15  # of a log, when something failed


@dataclass(frozen=True)
class Service:
    """What runs under a name. `problem` asks it: None, or why it does not answer."""

    name: str
    command: list[str]
    env: Mapping[str, str]
    cwd: Path
    address: str
    port: int | None
    problem: Callable[[], str | None]
    stop_signal: signal.Signals = signal.SIGTERM


def pid_file(folder: Path, name: str) -> Path:
    return folder / "run" / f"{name}.json"


def log_file(folder: Path, name: str) -> Path:
    return folder / "logs" / f"{name}.log"


def running(folder: Path, name: str) -> psutil.Process | None:
    """The process that was started under the name, if it still is that one: a pid may belong to another by now."""
    try:
        known = json.loads(pid_file(folder, name).read_text(encoding="utf-8"))
        process = psutil.Process(known["pid"])
        same = abs(process.create_time() - known["born"]) < 1 and process.status() != psutil.STATUS_ZOMBIE
    except (FileNotFoundError, psutil.NoSuchProcess):
        return None
    return process if same else None


def family(folder: Path, name: str) -> list[psutil.Process]:
    """Everything that lives of what was started under the name, also where its first process was killed: what is in
    its session, and what inherited its mark."""
    try:
        leader = int(json.loads(pid_file(folder, name).read_text(encoding="utf-8"))["pid"])
    except FileNotFoundError:
        leader = None
    else:
        if running(folder, name) is None and psutil.pid_exists(leader):  # another's by now, or dead and not yet gone
            leader = None if psutil.Process(leader).status() != psutil.STATUS_ZOMBIE else leader
    return [process for process in psutil.process_iter() if runs(process) and (
        (leader is not None and _session_of(process.pid) == leader) or _mark_of(process) == mark(folder, name))]


def mark(folder: Path, name: str) -> str:
    """ONEDIFF_SERVICE of a service and of all that it starts."""
    return f"{folder.absolute()}:{name}"


def launch(service: Service, folder: Path) -> None:
    """Starts the process in a session of its own, its output at the end of its log."""
    log = log_file(folder, service.name)
    for path in (log, pid_file(folder, service.name)):
        path.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab", buffering=0) as output:
        os.fchmod(output.fileno(), 0o600)
        output.write(f"== {time.strftime('%Y-%m-%d %H:%M:%S')} {service.name} starts\n".encode())
        process = subprocess.Popen(service.command, cwd=service.cwd, stdin=subprocess.DEVNULL, stdout=output,
                                   stderr=subprocess.STDOUT, start_new_session=True,
                                   env={**service.env, MARK: mark(folder, service.name)})
    born = psutil.Process(process.pid).create_time()
    part = pid_file(folder, service.name).with_suffix(".part")
    part.write_text(json.dumps({"pid": process.pid, "born": born}), encoding="utf-8")
    part.rename(pid_file(folder, service.name))  # whole or not at all


def wait_until_it_answers(service: Service, folder: Path, limit_s: float) -> None:
    """Raises ValueError with the last lines of the log if it ends, or does not answer within the time."""
    last = time.monotonic() + limit_s
    while problem := service.problem():
        ended = running(folder, service.name) is None
        if ended or time.monotonic() > last:
            why = "ended at once" if ended else f"does not answer after {limit_s:.0f} s ({problem})"
            log = log_file(folder, service.name)
            raise ValueError(f"{service.name} {why}; {log} ends with:\n{tail(log)}")
        time.sleep(0.2)


def end(folder: Path, name: str, *, grace_s: float = GRACE_S, first: signal.Signals = signal.SIGTERM) -> bool:
    """Ends all that was started under the name: signal `first` to its first process, then SIGTERM to what is left,
    then SIGKILL; each of the two waits takes `grace_s` at most. True: something ran."""
    members, leader = family(folder, name), running(folder, name)
    if leader is not None:
        send([leader], first)
        _wait([leader], grace_s)
    left = _wait(members, 0)
    send(left, signal.SIGTERM)
    left = _wait(left, grace_s)
    send(left, signal.SIGKILL)
    _wait(left, grace_s)
    pid_file(folder, name).unlink(missing_ok=True)
    return bool(members)


def tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    return "\n".join(f"  | {line}" for line in lines[-SHOWN_LINES:])


def need_free(port: int, key: str) -> None:
    """Raises ValueError with the cure if something listens on the port already."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a server that just ended does not count
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            raise ValueError(f"port {port} is in use: end what listens there, or set another one in runtime.yaml, "
                             f"services: {{{key}: {port + 1000}}}") from None


def memory_mb(folder: Path, name: str) -> int:
    """Of the service and all below it, pages that several of its processes share counted once."""
    total = 0
    for process in family(folder, name):
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return round(total / 2**20)


def _session_of(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except (ProcessLookupError, PermissionError):
        return None


def _mark_of(process: psutil.Process) -> str | None:
    try:
        return process.environ().get(MARK)
    except psutil.Error:  # gone, or another user's
        return None


def _wait(processes: list[psutil.Process], limit_s: float) -> list[psutil.Process]:
    """Those that still live after the time."""
    last = time.monotonic() + limit_s
    while (left := [process for process in processes if runs(process)]) and time.monotonic() < last:
        time.sleep(0.05)
    return left
