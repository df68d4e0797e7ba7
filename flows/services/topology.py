"""Describe the servers and workers of one folder: their commands, environments, databases and addresses."""

import hashlib
import json
import os
import secrets
import shutil
import socket
import sys
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import httpx

from flows.processes import code_env
from flows.services import postgres
from flows.services.background import Service
from onediff.config import Runtime
from onediff.files import refusing_lock

MLFLOW_USER = "admin"
# environment variable with a password; if it is set, the MLflow server requires this password
MLFLOW_PASSWORD = "ONEDIFF_MLFLOW_ADMIN_PASSWORD"
# environment variable with user:password; if it is set, the Prefect server requires this login
PREFECT_LOGIN = "PREFECT_SERVER_API_AUTH_STRING"
LOGINS = (MLFLOW_PASSWORD, PREFECT_LOGIN)
NOT_INHERITED = (  # environment variables that services do not inherit: addresses of other servers, and secrets
    "PG", "PREFECT_API_", "PREFECT_SERVER_API_", "PREFECT_SERVER_DATABASE_", "PREFECT_PROFILE", "PREFECT__",
    "MLFLOW_TRACKING_", "MLFLOW_BACKEND_", "MLFLOW_REGISTRY_", "MLFLOW_ARTIFACTS_", "MLFLOW_AUTH_", "MLFLOW_FLASK_",
    "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_", MLFLOW_PASSWORD)
Database = Literal["postgresql", "sqlite"]
QUIET = {"DO_NOT_TRACK": "1", "DVC_NO_ANALYTICS": "1", "MLFLOW_DISABLE_TELEMETRY": "true",
         "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
         "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false"}


@dataclass(frozen=True)
class Stack:
    """The configuration of the services in one folder: runtime.yaml, and the kind of database in the folder."""

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
        """Return the SQLAlchemy address of the database `prefect` or `mlflow`.

        `drivers` are SQLAlchemy's names of the drivers for PostgreSQL and for SQLite. The address has no password,
        because clients read the password from the file that PGPASSFILE names.
        """
        if self.database == "postgresql":
            return f"{drivers[0]}://{postgres.USER}@127.0.0.1:{self.runtime.services.postgres_port}/{name}"
        return f"{drivers[1]}:///{(self.folder / 'databases' / f'{name}.db').absolute()}"


def load_stack(runtime: Runtime) -> Stack:
    """Return the configuration of the services, with the kind of database that services.folder has or will get.

    Writes nothing. Raises ValueError if runtime.yaml requires another kind than the folder has, or if PostgreSQL is
    required and cannot run there.
    """
    folder, database = Path(runtime.services.folder), runtime.services.database
    began_with: Database | None = _settings(folder).get("database")
    if began_with is not None and database not in ("auto", began_with):
        raise ValueError(f"runtime.yaml: services.database is {database}, but {folder} already has a {began_with} "
                         f"database: set services.database to {began_with}, or set another services.folder")
    obstacle = postgres.obstacle(folder)
    if database == "auto":
        database = began_with or ("sqlite" if obstacle else "postgresql")
    if database == "postgresql" and obstacle:
        raise ValueError(f"{folder}: {obstacle}: set services.folder to a folder that PostgreSQL can use"
                         + ("" if began_with else ", or services.database to sqlite"))
    return Stack(folder, runtime, database)


def begin(stack: Stack) -> None:
    """Create the folder of the services, write its services.json, and undo a restore of SQLite that was interrupted.

    Raises ValueError if a server that required a password would now start without one.
    """
    settings = _settings(stack.folder)
    for key in LOGINS:
        if settings.get(key) and not os.environ.get(key):
            raise ValueError(f"{stack.folder}: the server was protected by {key} before, and this environment variable "
                             "is not set now: set it")
    databases, old = stack.folder / "databases", stack.folder / "databases.old"
    if old.exists() and not databases.exists():
        old.rename(databases)
    for rest in (old, stack.folder / "databases.new"):
        shutil.rmtree(rest, ignore_errors=True)
    for part in ("logs", "run", "prefect", "mlflow", "databases"):
        (stack.folder / part).mkdir(parents=True, exist_ok=True, mode=0o700)
    stack.folder.chmod(0o755)  # The user `postgres` needs access to this folder; files with secrets have mode 0600.
    settings |= {"database": stack.database, **{key: bool(os.environ.get(key)) for key in LOGINS}}
    (stack.folder / "services.json").write_text(json.dumps(settings), encoding="utf-8")
    if not (stack.folder / "flask_key").exists():
        postgres.write_secret(stack.folder / "flask_key", secrets.token_urlsafe(32))
    (stack.folder / "mlflow/auth.ini").write_text(
        f"[mlflow]\ndefault_permission = READ\ndatabase_uri = {stack.database_address('mlflow')}\n", encoding="utf-8")


def exclusive(folder: Path) -> AbstractContextManager[None]:
    """Return a lock that allows one start, stop, backup or restore at a time; raises ValueError if another one runs."""
    return refusing_lock(folder / "lock", f"{folder}: another start, stop, backup or restore is running: wait for it")


def pools(runtime: Runtime) -> list[str]:
    """Return the Prefect work pools whose stages this machine can run."""
    gpu = runtime.device == "cuda" or (runtime.device == "auto" and any(Path("/dev").glob("nvidia[0-9]*")))
    return ["onediff-cpu", *(["onediff-gpu"] if gpu else [])]


def servers(stack: Stack) -> list[Service]:
    """Return the descriptions of the Prefect server and the MLflow server."""
    settings, api = stack.runtime.services, stack.prefect_api
    login, password = os.environ.get(PREFECT_LOGIN), os.environ.get(MLFLOW_PASSWORD)
    prefect = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1",
               "--port", str(settings.prefect_port)]
    mlflow = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(settings.mlflow_port),
              "--workers", "1", *(["--app-name", "basic-auth"] if password else [])]
    return [Service("prefect", prefect, prefect_env(stack), stack.folder / "prefect", api, settings.prefect_port,
                    lambda: [_query(f"{api}/{path}", PREFECT_LOGIN, login) for path in ("admin/version", "ready")]),
            Service("mlflow", mlflow, mlflow_env(stack), stack.folder / "mlflow", stack.mlflow, settings.mlflow_port,
                    lambda: _query(f"{stack.mlflow}/api/2.0/mlflow/experiments/search?max_results=1", MLFLOW_PASSWORD,
                                   f"{MLFLOW_USER}:{password}" if password else None))]


def workers(stack: Stack) -> list[Service]:
    """Return the description of one worker for each work pool. A worker creates its pool if the pool does not exist."""
    # The worker's name contains a digest of the folder's path, because several clones may run workers on one machine.
    clone = hashlib.sha256(str(stack.folder.absolute()).encode()).hexdigest()[:6]
    name = f"{socket.gethostname()}-{clone}"
    return [Service(pool, [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--type", "process",
                           "--name", name, "--install-policy", "never"],
                    worker_env(stack), Path.cwd(), pool, None, partial(_check_worker, stack, pool, name))
            for pool in pools(stack.runtime)]


def shell_lines(stack: Stack) -> str:
    """Return `export` lines with which a shell uses the servers.

    Passwords are not written out: the lines refer to environment variables of the shell.
    """
    lines = [f"export PREFECT_API_URL={stack.prefect_api}", f"export MLFLOW_TRACKING_URI={stack.mlflow}"]
    if os.environ.get(PREFECT_LOGIN):
        lines.append(f'export PREFECT_API_AUTH_STRING="${{{PREFECT_LOGIN}:?}}"')
    if os.environ.get(MLFLOW_PASSWORD):
        lines += [f"export MLFLOW_TRACKING_USERNAME={MLFLOW_USER}",
                  f'export MLFLOW_TRACKING_PASSWORD="${{{MLFLOW_PASSWORD}:?}}"']
    return "\n".join(lines) + "\n"


def _base_env(stack: Stack) -> dict[str, str]:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(NOT_INHERITED)}
    return {**inherited, **QUIET, **code_env(), "PREFECT_HOME": str((stack.folder / "prefect").absolute()),
            "PREFECT_API_URL": stack.prefect_api}


def prefect_env(stack: Stack) -> dict[str, str]:
    """Return the environment of the Prefect server and of the tool that upgrades its database."""
    login = os.environ.get(PREFECT_LOGIN)
    return {**_base_env(stack), **(postgres.client_env(stack.folder) if stack.database == "postgresql" else {}),
            **({PREFECT_LOGIN: login, "PREFECT_API_AUTH_STRING": login} if login else {}),
            "PREFECT_SERVER_DATABASE_CONNECTION_URL":
                stack.database_address("prefect", ("postgresql+asyncpg", "sqlite+aiosqlite"))}


def mlflow_env(stack: Stack) -> dict[str, str]:
    """Return the environment of the MLflow server and of the commands that upgrade or clean its database."""
    folder, key = stack.folder / "mlflow", stack.folder / "flask_key"
    password = os.environ.get(MLFLOW_PASSWORD)
    auth = {"MLFLOW_AUTH_CONFIG_PATH": str((folder / "auth.ini").absolute()), "MLFLOW_AUTH_ADMIN_USERNAME": MLFLOW_USER,
            "MLFLOW_AUTH_ADMIN_PASSWORD": password,
            "MLFLOW_FLASK_SERVER_SECRET_KEY": key.read_text() if key.exists() else ""} if password else {}
    return {**_base_env(stack), **(postgres.client_env(stack.folder) if stack.database == "postgresql" else {}), **auth,
            "MLFLOW_BACKEND_STORE_URI": stack.database_address("mlflow"), "MLFLOW_SERVE_ARTIFACTS": "true",
            "MLFLOW_ARTIFACTS_DESTINATION": (folder / "artifacts").absolute().as_uri()}


def worker_env(stack: Stack) -> dict[str, str]:
    """Return the environment of a Prefect worker. The worker's flows inherit it, so they use the servers of `stack`."""
    login, password = os.environ.get(PREFECT_LOGIN), os.environ.get(MLFLOW_PASSWORD)
    return {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30", **_base_env(stack), "ONEDIFF_PROJECT": str(Path.cwd()),
            "MLFLOW_TRACKING_URI": stack.mlflow,
            **({"PREFECT_API_AUTH_STRING": login} if login else {}),
            **({"MLFLOW_TRACKING_USERNAME": MLFLOW_USER, "MLFLOW_TRACKING_PASSWORD": password} if password else {})}


def _check_worker(stack: Stack, pool: str, name: str) -> None:
    url = f"{stack.prefect_api}/work_pools/{pool}/workers/filter"
    workers = _query(url, PREFECT_LOGIN, os.environ.get(PREFECT_LOGIN), body={})
    if not any(worker["name"] == name and worker["status"] == "ONLINE" for worker in workers):
        raise ValueError("the Prefect server does not list the worker as online")


def _query(url: str, key: str, login: str | None, *, body: dict[str, Any] | None = None) -> Any:
    """Send a request to a server and return its JSON answer.

    `login` is user:password, the value of the environment variable `key`. Raises ValueError if the server does not
    answer or answers with an error.
    """
    try:
        response = httpx.request("GET" if body is None else "POST", url, json=body, timeout=5, trust_env=False,
                                 auth=httpx.BasicAuth(*login.split(":", 1)) if login else None)
    except httpx.TransportError as error:
        raise ValueError(str(error)) from None
    if response.status_code in (401, 403):
        raise ValueError(f"the server refuses the credentials in the environment variable {key}" if login
                         else f"the server requires credentials: set {key}")
    if response.is_error:
        raise ValueError(f"the server answers with HTTP status {response.status_code}")
    return response.json()


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / "services.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
