"""What runs where: the servers, the workers, their databases and addresses, and how each is asked how it is."""

from __future__ import annotations

import base64
import fcntl
import hashlib
import json
import os
import secrets
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from flows.services import postgres
from flows.services.background import Service
from onediff.config import Runtime

CODE = Path(__file__).resolve().parents[2]
MLFLOW_USER = "admin"
MLFLOW_PASSWORD = "ONEDIFF_MLFLOW_ADMIN_PASSWORD"  # set: the MLflow server asks for it
PREFECT_LOGIN = "PREFECT_SERVER_API_AUTH_STRING"  # user:password; set: the Prefect server asks for it
LOGINS = (MLFLOW_PASSWORD, PREFECT_LOGIN)
LEADS_ELSEWHERE = (  # settings of the shell that would, or that are secrets of one service
    "PG", "PREFECT_API_", "PREFECT_SERVER_API_", "PREFECT_SERVER_DATABASE_", "PREFECT_PROFILE", "PREFECT__",
    "MLFLOW_TRACKING_", "MLFLOW_BACKEND_", "MLFLOW_REGISTRY_", "MLFLOW_ARTIFACTS_", "MLFLOW_AUTH_", "MLFLOW_FLASK_",
    "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_", MLFLOW_PASSWORD)
Database = Literal["postgresql", "sqlite"]
QUIET = {"DO_NOT_TRACK": "1", "DVC_NO_ANALYTICS": "1", "MLFLOW_DISABLE_TELEMETRY": "true",
         "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
         "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false", "PYTHONUNBUFFERED": "1"}


@dataclass(frozen=True)
class Place:
    """One folder of services: what it began with (`services.json`) and what runtime.yaml says of it now."""

    folder: Path
    runtime: Runtime
    database: Database

    @property
    def prefect_api(self) -> str:
        return f"http://127.0.0.1:{self.runtime.services.prefect_port}/api"

    @property
    def mlflow(self) -> str:
        return f"http://127.0.0.1:{self.runtime.services.mlflow_port}"

    def database_address(self, name: str, drivers: tuple[str, str] = ("postgresql+psycopg2", "sqlite")) -> str:
        """Of the database `prefect` or `mlflow`, with the drivers named; without a password."""
        if self.database == "postgresql":
            return postgres.address(self.runtime.services.postgres_port, name, drivers[0])
        return f"{drivers[1]}:///{(self.folder / 'databases' / f'{name}.db').absolute()}"


def place(runtime: Runtime) -> Place:
    """The folder as it is; one that is new gets what services.database asks for, and nothing is written yet.

    Raises ValueError if PostgreSQL is asked for and cannot be kept there.
    """
    folder, wanted = Path(runtime.services.folder), runtime.services.database
    known: Database | None = _settings(folder).get("database")
    if known is not None and wanted not in ("auto", known):
        raise ValueError(f"runtime.yaml: services.database is {wanted}, but {folder} began with {known}: set it so, "
                         "or set another services.folder")
    obstacle = postgres.obstacle(folder)
    if known is None and wanted == "auto":
        known = "sqlite" if obstacle else "postgresql"
    if (known or wanted) == "postgresql" and obstacle:
        raise ValueError(f"{folder}: {obstacle}: set services.folder to one that it can use"
                         + ("" if _settings(folder) else ", or services.database to sqlite"))
    return Place(folder, runtime, "postgresql" if (known or wanted) == "postgresql" else "sqlite")


def begin(where: Place) -> None:
    """Makes the folder and writes down what it stays with.

    Raises ValueError if a server that asked for a password would now be started without one.
    """
    settings = _settings(where.folder)
    for key in LOGINS:
        if settings.get(key) and not os.environ.get(key):
            raise ValueError(f"{where.folder}: its server was started with {key}; set it, as before")
    for part in ("logs", "run", "prefect", "mlflow", "databases"):
        (where.folder / part).mkdir(parents=True, exist_ok=True, mode=0o700)
    where.folder.chmod(0o755)  # whatever the umask: user `postgres` must pass; what is secret is closed in itself
    settings |= {"database": where.database, **{key: bool(os.environ.get(key)) for key in LOGINS}}
    (where.folder / "services.json").write_text(json.dumps(settings), encoding="utf-8")
    if not (where.folder / "flask_key").exists():
        postgres.write_secret(where.folder / "flask_key", secrets.token_urlsafe(32))
    (where.folder / "mlflow/auth.ini").write_text(
        f"[mlflow]\ndefault_permission = READ\ndatabase_uri = {where.database_address('mlflow')}\n", encoding="utf-8")


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """One start, stop, backup or restore at a time. Raises ValueError if another goes on."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder}: another start, stop, backup or restore goes on: wait for it") from None
        yield


def pools(runtime: Runtime) -> list[str]:
    """Work pools that this machine serves."""
    gpu = runtime.device == "cuda" or (runtime.device == "auto" and any(Path("/dev").glob("nvidia[0-9]*")))
    return ["onediff-cpu", *(["onediff-gpu"] if gpu else [])]


def servers(where: Place) -> list[Service]:
    ports = where.runtime.services
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(ports.mlflow_port),
               "--workers", "1", *(["--app-name", "basic-auth"] if os.environ.get(MLFLOW_PASSWORD) else [])]
    prefect = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1",
               "--port", str(ports.prefect_port)]
    return [Service("prefect", prefect, _prefect_env(where), where.folder / "prefect", where.prefect_api,
                    ports.prefect_port, lambda: _problem(f"{where.prefect_api}/admin/version", prefect_login())
                    or _problem(f"{where.prefect_api}/ready", None)),
            Service("mlflow", command, _mlflow_env(where), where.folder / "mlflow", where.mlflow, ports.mlflow_port,
                    lambda: _problem(f"{where.mlflow}/api/2.0/mlflow/experiments/search?max_results=1",
                                     mlflow_login()))]


def workers(where: Place) -> list[Service]:
    """One for each pool, in the project's folder; it makes its pool if need be."""
    beside = hashlib.sha256(str(where.folder.absolute()).encode()).hexdigest()[:6]  # other clones of this machine
    name = f"{socket.gethostname()}-{beside}"
    return [Service(pool, [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--type", "process",
                           "--name", name, "--install-policy", "never"],
                    worker_env(where), Path.cwd(), pool, None,
                    partial(_worker_problem, where, pool, name))
            for pool in pools(where.runtime)]


def shell_lines(where: Place) -> str:
    """What a shell needs to use the servers; passwords stay where they are, in its environment."""
    lines = [f"export PREFECT_API_URL={where.prefect_api}", f"export MLFLOW_TRACKING_URI={where.mlflow}"]
    if os.environ.get(PREFECT_LOGIN):
        lines.append(f'export PREFECT_API_AUTH_STRING="${{{PREFECT_LOGIN}:?}}"')
    if os.environ.get(MLFLOW_PASSWORD):
        lines += [f"export MLFLOW_TRACKING_USERNAME={MLFLOW_USER}",
                  f'export MLFLOW_TRACKING_PASSWORD="${{{MLFLOW_PASSWORD}:?}}"']
    return "\n".join(lines) + "\n"


def server_env(where: Place, name: str) -> dict[str, str]:
    """Of the server `prefect` or `mlflow`: what also its database tools need."""
    return {"prefect": _prefect_env, "mlflow": _mlflow_env}[name](where)


def prefect_login() -> str | None:
    return os.environ.get(PREFECT_LOGIN)


def mlflow_login() -> str | None:
    password = os.environ.get(MLFLOW_PASSWORD)
    return f"{MLFLOW_USER}:{password}" if password else None


def _base_env(where: Place) -> dict[str, str]:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(LEADS_ELSEWHERE)}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    python = os.pathsep.join(filter(None, [str(CODE), os.environ.get("PYTHONPATH")]))
    return {**inherited, **QUIET, "PATH": path, "PYTHONPATH": python,
            "PREFECT_HOME": str((where.folder / "prefect").absolute())}


def _prefect_env(where: Place) -> dict[str, str]:
    login = prefect_login()
    return {**_base_env(where), **(postgres.client_env(where.folder) if where.database == "postgresql" else {}),
            **({PREFECT_LOGIN: login, "PREFECT_API_AUTH_STRING": login} if login else {}),
            "PREFECT_API_URL": where.prefect_api,
            "PREFECT_SERVER_DATABASE_CONNECTION_URL":
                where.database_address("prefect", ("postgresql+asyncpg", "sqlite+aiosqlite"))}


def _mlflow_env(where: Place) -> dict[str, str]:
    files = where.folder / "mlflow"
    password = os.environ.get(MLFLOW_PASSWORD)
    auth = {"MLFLOW_AUTH_CONFIG_PATH": str((files / "auth.ini").absolute()), "MLFLOW_AUTH_ADMIN_USERNAME": MLFLOW_USER,
            "MLFLOW_AUTH_ADMIN_PASSWORD": password,
            "MLFLOW_FLASK_SERVER_SECRET_KEY": _flask_key(where.folder)} if password else {}
    return {**_base_env(where), **(postgres.client_env(where.folder) if where.database == "postgresql" else {}), **auth,
            "MLFLOW_BACKEND_STORE_URI": where.database_address("mlflow"), "MLFLOW_SERVE_ARTIFACTS": "true",
            "MLFLOW_ARTIFACTS_DESTINATION": (files / "artifacts").absolute().as_uri()}


def _flask_key(folder: Path) -> str:
    return (folder / "flask_key").read_text() if (folder / "flask_key").exists() else ""


def worker_env(where: Place) -> dict[str, str]:
    """The flows that it starts inherit it, and so use these servers; heartbeats tell the server that they live."""
    login, password = prefect_login(), os.environ.get(MLFLOW_PASSWORD)
    return {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30", **_base_env(where), "ONEDIFF_PROJECT": str(Path.cwd()),
            "PREFECT_API_URL": where.prefect_api,
            "MLFLOW_TRACKING_URI": where.mlflow,
            **({"PREFECT_API_AUTH_STRING": login} if login else {}),
            **({"MLFLOW_TRACKING_USERNAME": MLFLOW_USER, "MLFLOW_TRACKING_PASSWORD": password} if password else {})}


def _problem(url: str, login: str | None, body: dict[str, Any] | None = None) -> str | None:
    """None if the address answers, else why not."""
    try:
        _fetch(url, login, body)
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            return "it asks for other credentials" if login else f"it asks for credentials: set {_key_of(url)}"
        return f"it answers {error.code}"
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error))
    return None


def _worker_problem(where: Place, pool: str, name: str) -> str | None:
    """Whether the Prefect server hears from the worker."""
    try:
        found = _fetch(f"{where.prefect_api}/work_pools/{pool}/workers/filter", prefect_login(), {})
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error))
    online = any(worker["name"] == name and worker["status"] == "ONLINE" for worker in found)
    return None if online else "the Prefect server has not heard of it"


def _fetch(url: str, login: str | None, body: dict[str, Any] | None = None) -> Any:
    request = urllib.request.Request(url, None if body is None else json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    if login:
        request.add_header("Authorization", f"Basic {base64.b64encode(login.encode()).decode()}")
    with urllib.request.urlopen(request, timeout=5) as answer:
        return json.loads(answer.read())


def _key_of(url: str) -> str:
    return PREFECT_LOGIN if "/api/admin/" in url else MLFLOW_PASSWORD


def _settings(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / "services.json").read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
