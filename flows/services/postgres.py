"""A PostgreSQL cluster of its own in the folder. Its password stands in a file that only its owner reads, nowhere else.

Clients find it through PGPASSFILE, so no address, no command line and no log holds it.
"""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from flows.services import background
from flows.services.background import Service

NAMES = ("prefect", "mlflow")  # the databases
USER = "onediff"  # in PostgreSQL
SYSTEM_USER = "postgres"  # PostgreSQL refuses to run as root


def binaries() -> Path | None:
    """The folder with initdb and postgres, or None where PostgreSQL is not installed."""
    found = shutil.which("initdb")
    if found:
        return Path(found).resolve().parent
    if shutil.which("pg_config"):
        told = subprocess.run(["pg_config", "--bindir"], capture_output=True, text=True, check=False).stdout.strip()
        if (Path(told) / "initdb").exists():
            return Path(told)
    debian = [path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/initdb")]
    return max(debian, key=lambda folder: float(folder.parent.name), default=None)


def obstacle(folder: Path) -> str | None:
    """Why no cluster can be kept in the folder by this user, or None."""
    if binaries() is None:
        return "PostgreSQL is not installed"
    if os.geteuid():
        return None
    try:
        pwd.getpwnam(SYSTEM_USER)
    except KeyError:
        return f"PostgreSQL does not run as root, and there is no user '{SYSTEM_USER}'"
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if subprocess.run(as_its_user(["test", "-x", str(nearest)]), check=False).returncode:
        return f"PostgreSQL does not run as root, and user '{SYSTEM_USER}' may not enter {nearest}"
    return None


def as_its_user(command: list[str]) -> list[str]:
    """The command as the user that owns the cluster: this one, or for root the system user `postgres`."""
    if os.geteuid():
        return command
    return ["setpriv", f"--reuid={SYSTEM_USER}", f"--regid={SYSTEM_USER}", "--init-groups", *command]


def address(port: int, name: str, driver: str) -> str:
    """Without a password: that is in PGPASSFILE."""
    return f"{driver}://{USER}@127.0.0.1:{port}/{name}"


def client_env(folder: Path) -> dict[str, str]:
    return {"PGPASSFILE": str((folder / "pgpass").absolute())}


def service(folder: Path, port: int) -> Service:
    """The server process. SIGINT is its fast shutdown: clients are cut off, data is written."""
    found = _need_binaries()
    command = as_its_user([str(found / "postgres"), "-D", str((folder / "postgres").absolute()), "-p", str(port),
                           "-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories="])
    return Service("postgres", command, _plain_env(), Path("/"), f"127.0.0.1:{port}", port,
                   lambda: ask(folder, port, "postgres", "select 1"), signal.SIGINT)


def prepare(folder: Path) -> None:
    """Makes the cluster where there is none yet, and lifts the lock of a server that was killed.

    Raises ValueError if the password of a cluster is gone.
    """
    data = folder / "postgres"
    if not data.exists():
        _make(folder, data)
    if not (folder / "pgpass").exists():
        raise ValueError(f"{folder / 'pgpass'} not found: it held the password of the cluster beside it; bring it "
                         f"back, or move {data} away, start, and restore a backup")
    lock = data / "postmaster.pid"
    if lock.exists() and not _is_postgres(int(lock.read_text().split()[0])):
        lock.unlink()


def make_databases(folder: Path, port: int) -> None:
    """Those that are not there yet."""
    for name in NAMES:
        if not tool(folder, port, "psql", "-d", "postgres", "-Atc",
                    f"select 1 from pg_database where datname = '{name}'").strip():
            tool(folder, port, "createdb", name)


def ask(folder: Path, port: int, database: str, query: str) -> str | None:
    """None if the server answers the query, else why not."""
    try:
        tool(folder, port, "psql", "-d", database, "-Atc", query)
    except ValueError as error:
        return str(error)
    return None


def tool(folder: Path, port: int, name: str, *arguments: str) -> str:
    """Runs one of PostgreSQL's client programs; gives what it prints. Raises ValueError with its last words."""
    command = [str(_need_binaries() / name), "-h", "127.0.0.1", "-p", str(port), "-U", USER, "-w", *arguments]
    done = subprocess.run(command, env={**_plain_env(), **client_env(folder), "PGCONNECT_TIMEOUT": "5"},
                          capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"PostgreSQL on port {port}: {name}: {' '.join(done.stderr.split())[-300:]}")
    return done.stdout


@contextmanager
def up(folder: Path, port: int, start_s: float) -> Iterator[None]:
    """The server runs inside: the one that runs already, or one only for this."""
    if background.running(folder, "postgres"):
        yield
        return
    start(folder, port, start_s)
    try:
        yield
    finally:
        background.end(folder, "postgres", first=signal.SIGINT)


def start(folder: Path, port: int, start_s: float) -> None:
    """Raises ValueError if the port is taken or the server does not come up; then nothing of it runs on."""
    background.end(folder, "postgres", first=signal.SIGINT)
    background.need_free(port, "postgres_port")
    prepare(folder)
    wanted = service(folder, port)
    background.launch(wanted, folder)
    try:
        background.wait_until_it_answers(wanted, folder, start_s)
        make_databases(folder, port)
    except BaseException:
        background.end(folder, "postgres", first=signal.SIGINT)
        raise


def _make(folder: Path, data: Path) -> None:
    """Whole or not at all: initdb works beside, and the folder gets its name at the end."""
    part, told = data.with_suffix(".part"), folder / "pgpass.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True, mode=0o700)
    password = secrets.token_urlsafe(32)
    write_secret(folder / "pgpass", f"127.0.0.1:*:*:{USER}:{password}\n")
    write_secret(told, password)
    if not os.geteuid():
        for path in (part, told):
            shutil.chown(path, SYSTEM_USER, SYSTEM_USER)
    command = as_its_user([str(_need_binaries() / "initdb"), "-D", str(part.absolute()), "-U", USER, "-E", "UTF8",
                           "--locale=C.UTF-8", "-A", "scram-sha-256", "--no-instructions",
                           f"--pwfile={told.absolute()}"])
    try:
        done = subprocess.run(command, env=_plain_env(), cwd="/", capture_output=True, text=True, check=False)
    finally:
        told.unlink()
    if done.returncode:
        raise ValueError(f"{part}: initdb failed: {' '.join(done.stderr.split())[-300:]}")
    part.rename(data)


def write_secret(path: Path, text: str) -> None:
    """A file that only its owner reads, from its first moment on."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)


def _is_postgres(pid: int) -> bool:
    """One that was killed keeps number and name until its parent takes notice; PostgreSQL would take it for alive."""
    try:
        process = psutil.Process(pid)
        return process.name() == "postgres" and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _plain_env() -> dict[str, str]:
    """PG* of the shell would lead elsewhere; secrets of other services are not PostgreSQL's."""
    return {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C.UTF-8"}


def _need_binaries() -> Path:
    found = binaries()
    if found is None:
        raise ValueError("PostgreSQL is not installed: install it, or set services: {database: sqlite} in runtime.yaml")
    return found
