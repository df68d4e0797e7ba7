"""A PostgreSQL cluster for the services of one folder.

The password is in a file that no other user can read. Clients read it through PGPASSFILE, so no address, command line
or log contains the password.
"""

import os
import pwd
import secrets
import shutil
import subprocess
from pathlib import Path

import psutil

from flows.processes import is_alive, run_tool
from flows.services import background
from flows.services.background import Service
from onediff.files import new_folder

DATABASES = ("prefect", "mlflow")
USER = "onediff"  # the PostgreSQL role that owns both databases
SYSTEM_USER = "postgres"  # the system user that runs PostgreSQL if this user is root, because PostgreSQL refuses root


def binaries() -> Path | None:
    """Return the folder with the programs initdb and postgres, or None if PostgreSQL is not installed."""
    initdb = shutil.which("initdb")
    if initdb:
        return Path(initdb).resolve().parent
    if shutil.which("pg_config"):
        stdout = subprocess.run(["pg_config", "--bindir"], capture_output=True, text=True, check=False).stdout
        if (Path(stdout.strip()) / "initdb").exists():
            return Path(stdout.strip())
    debian = [path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/initdb")]
    return max(debian, key=lambda folder: float(folder.parent.name), default=None)


def obstacle(folder: Path) -> str | None:
    """Return the reason why this user cannot run PostgreSQL in the folder, or None if that is possible."""
    if binaries() is None:
        return "PostgreSQL is not installed"
    if os.geteuid():
        return None
    try:
        pwd.getpwnam(SYSTEM_USER)
    except KeyError:
        return f"PostgreSQL does not run as root, and the system user '{SYSTEM_USER}' does not exist"
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if subprocess.run(_as_owner(["test", "-x", str(nearest)]), check=False).returncode:
        return f"PostgreSQL does not run as root, and the system user '{SYSTEM_USER}' has no access to {nearest}"
    return None


def _as_owner(command: list[str]) -> list[str]:
    """Return `command`; if this user is root, put `setpriv` before it, so that the user `postgres` runs it."""
    if os.geteuid():
        return command
    return ["setpriv", f"--reuid={SYSTEM_USER}", f"--regid={SYSTEM_USER}", "--init-groups", *command]


def client_env(folder: Path) -> dict[str, str]:
    """Return the environment variable that tells PostgreSQL's clients where the password file is."""
    return {"PGPASSFILE": str((folder / "pgpass").absolute())}


def service(folder: Path, port: int) -> Service:
    """Return the description of the PostgreSQL server process."""
    command = _as_owner([_program("postgres"), "-D", str((folder / "postgres").absolute()), "-p", str(port),
                         "-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories="])
    return Service("postgres", command, _plain_env(), Path("/"), f"127.0.0.1:{port}", port,
                   lambda: tool(folder, port, "psql", "-d", "postgres", "-Atc", "select 1"))


def prepare(folder: Path) -> None:
    """Create the PostgreSQL cluster if it does not exist, and remove the lock file of a server that was killed.

    Raises ValueError if the cluster exists and the file with its password does not.
    """
    data = folder / "postgres"
    if not data.exists():
        _make(folder, data)
    if not (folder / "pgpass").exists():
        raise ValueError(f"{folder / 'pgpass'} does not exist, but it must contain the password of the database in "
                         f"{data}; restore the file, or move {data} away, start again, and restore a backup")
    lock = data / "postmaster.pid"
    if lock.exists() and not _is_postgres(int(lock.read_text().split()[0])):
        lock.unlink()


def tool(folder: Path, port: int, name: str, *arguments: str) -> str:
    """Run one of PostgreSQL's client programs and return its output. Raises ValueError with its message if it fails."""
    command = [_program(name), "-h", "127.0.0.1", "-p", str(port), "-U", USER, "-w", *arguments]
    return run_tool(command, f"PostgreSQL on port {port}: {name}",
                    env={**_plain_env(), **client_env(folder), "PGCONNECT_TIMEOUT": "5"})


def start(folder: Path, port: int, start_s: float) -> None:
    """Start the PostgreSQL server and create the databases `prefect` and `mlflow` if they do not exist yet.

    Raises ValueError if the port is in use or the server does not answer. After an error, the server does not run.
    """
    background.end(folder, "postgres")
    background.check_port_is_free(port, "postgres_port")
    prepare(folder)
    server = service(folder, port)
    background.launch(server, folder)
    try:
        background.wait_until_it_answers(server, folder, start_s)
        for name in DATABASES:
            if not tool(folder, port, "psql", "-d", "postgres", "-Atc",
                        f"select 1 from pg_database where datname = '{name}'").strip():
                tool(folder, port, "createdb", name)
    except BaseException:
        background.end(folder, "postgres")
        raise


def _make(folder: Path, data: Path) -> None:
    password, password_file = secrets.token_urlsafe(32), folder / "pgpass.part"
    write_secret(folder / "pgpass", f"127.0.0.1:*:*:{USER}:{password}\n")
    write_secret(password_file, password)
    try:
        with new_folder(data) as part:
            part.chmod(0o700)
            if not os.geteuid():
                for path in (part, password_file):
                    shutil.chown(path, SYSTEM_USER, SYSTEM_USER)
            command = [_program("initdb"), "-D", str(part.absolute()), "-U", USER, "-E", "UTF8", "--locale=C.UTF-8",
                       "-A", "scram-sha-256", "--no-instructions", f"--pwfile={password_file.absolute()}"]
            run_tool(_as_owner(command), f"{part}: initdb failed", env=_plain_env(), folder=Path("/"))
    finally:
        password_file.unlink()


def write_secret(path: Path, text: str) -> None:
    """Write a file that only this user can read: it is created with mode 0600 before the text is written."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)


def _is_postgres(pid: int) -> bool:
    """Return whether the process is a running PostgreSQL server.

    A killed server stays a zombie until its parent reads its exit status. PostgreSQL would count a zombie as running.
    """
    try:
        process = psutil.Process(pid)
        return process.name() == "postgres" and is_alive(process)
    except psutil.NoSuchProcess:
        return False


def _plain_env() -> dict[str, str]:
    """Return a minimal environment without the shell's PG* variables, which may name another server, and no secrets."""
    return {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C.UTF-8"}


def _program(name: str) -> str:
    folder = binaries()
    if folder is None:
        raise ValueError("PostgreSQL is not installed: install it, or set services: {database: sqlite} in runtime.yaml")
    return str(folder / name)
