"""Backup, restore, schema upgrade and purge of the databases `prefect` and `mlflow`, in PostgreSQL or SQLite.

MLflow's artifacts are ordinary files (`mlflow/artifacts`, or S3) and are not part of a backup.
"""

import json
import shutil
import sqlite3
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from flows.processes import run_tool
from flows.services import background, postgres, topology
from flows.services.topology import Stack
from onediff.files import new_folder, sha256_of, write_json

MANIFEST = "manifest.json"
SUFFIX = {"postgresql": ".dump", "sqlite": ".db"}


def backup(stack: Stack, target: Path) -> str:
    """Write the databases of Prefect and MLflow into a new folder. This works while their servers run.

    The folder appears only when the backup is complete. Raises ValueError if the folder is not empty, or if there is no
    database yet.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} is not empty: choose a new folder for the backup")
    with new_folder(target) as part:
        part.chmod(0o700)
        with _database_up(stack):
            for name in postgres.DATABASES:
                _dump(stack, name, part / f"{name}{SUFFIX[stack.database]}")
        files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
                 for path in sorted(part.iterdir())}
        write_json(part / MANIFEST, {
            "made": datetime.now(UTC).isoformat(timespec="seconds"), "database": stack.database,
            "versions": {name: version(name) for name in postgres.DATABASES}, "files": files}, indent=2)
    return (f"{target}: {', '.join(files)} ({sum((target / name).stat().st_size for name in files) / 2**20:.1f} MB); "
            f"MLflow's artifacts are not in the backup: copy {stack.folder / 'mlflow/artifacts'} as well")


def restore(stack: Stack, source: Path) -> str:
    """Replace the databases of Prefect and MLflow by a backup; if one cannot be restored, both stay unchanged.

    Raises ValueError if a server runs, if the backup is damaged, or if the backup is of the other kind of database
    (PostgreSQL or SQLite).
    """
    _refuse_while_running(stack, f"python -m flows.services restore {source}")
    manifest = _checked_manifest(stack, source)
    topology.begin(stack)
    if stack.database == "postgresql":
        with _database_up(stack):
            _restore_postgres(stack, source)
    else:
        _restore_sqlite(stack, source)
    return f"{stack.folder}: restored the backup of {manifest['made']}; 'make services' starts the servers"


def upgrade(stack: Stack) -> str:
    """Write a backup, then upgrade the database schemas of Prefect and MLflow to the installed versions.

    Raises ValueError if an upgrade fails; its message contains the command that restores the backup.
    """
    _refuse_while_running(stack, "make upgrade")
    topology.begin(stack)
    target = stack.folder / "backups" / datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
    lines = [backup(stack, target)]
    commands = {"mlflow": (topology.mlflow_env(stack), ["db", "upgrade", stack.database_address("mlflow")]),
                "prefect": (topology.prefect_env(stack), ["--no-prompt", "server", "database", "upgrade", "-y"])}
    with _database_up(stack):
        for name, (env, arguments) in commands.items():
            run_tool([sys.executable, "-m", name, *arguments],
                     f"{name} {version(name)} could not upgrade its database ('python -m flows.services restore "
                     f"{target}' restores the old one)", env=env, folder=stack.folder / name)
            lines.append(f"{name}: schema of version {version(name)}")
    return "\n".join(lines)


def purge(stack: Stack, runs: Sequence[str]) -> str:
    """Remove the MLflow runs that the server has marked as deleted, with their artifacts. The server must run."""
    run_tool([sys.executable, "-m", "mlflow", "gc", "--backend-store-uri", stack.database_address("mlflow"),
              "--run-ids", ",".join(runs)], "mlflow gc", folder=stack.folder / "mlflow",
             env=topology.worker_env(stack) | topology.mlflow_env(stack))
    return f"removed {len(runs)} deleted runs from the MLflow server"


def _refuse_while_running(stack: Stack, again: str) -> None:
    for name in postgres.DATABASES:
        if background.running(stack.folder, name):
            raise ValueError(f"{stack.folder}: the {name} server is running: run 'make services-stop', then {again}")


@contextmanager
def _database_up(stack: Stack) -> Iterator[None]:
    """Provide a running PostgreSQL inside the `with` block; if none runs, start one and stop it at the end."""
    if stack.database == "sqlite" or background.running(stack.folder, "postgres"):
        yield
        return
    settings = stack.runtime.services
    postgres.start(stack.folder, settings.postgres_port, settings.start_s)
    try:
        yield
    finally:
        background.end(stack.folder, "postgres")


def _dump(stack: Stack, name: str, target: Path) -> None:
    if stack.database == "postgresql":
        postgres.tool(stack.folder, stack.runtime.services.postgres_port, "pg_dump", "-Fc", "-f", str(target), name)
        target.chmod(0o600)
        return
    database = stack.folder / "databases" / f"{name}.db"
    if not database.exists():
        raise ValueError(f"{database} does not exist, so there is nothing to back up; 'make services' creates it")
    with closing(sqlite3.connect(database)) as old, closing(sqlite3.connect(target)) as new:
        old.backup(new)  # SQLite's backup function copies a consistent state even while the servers write.


def _restore_postgres(stack: Stack, source: Path) -> None:
    """Restore the backup into new databases, then give them the names of the old databases in one transaction."""
    port, folder = stack.runtime.services.postgres_port, stack.folder

    def drop(suffix: str) -> None:
        for name in postgres.DATABASES:
            postgres.tool(folder, port, "dropdb", "--if-exists", "--force", f"{name}{suffix}")

    drop("_new")
    drop("_old")
    for name in postgres.DATABASES:
        postgres.tool(folder, port, "createdb", f"{name}_new")
        postgres.tool(folder, port, "pg_restore", "--exit-on-error", "--no-owner", "-d", f"{name}_new",
                      str(source / f"{name}.dump"))
    renames = [command for name in postgres.DATABASES
               for command in ("-c", f"alter database {name} rename to {name}_old",
                               "-c", f"alter database {name}_new rename to {name}")]
    postgres.tool(folder, port, "psql", "-d", "postgres", "-v", "ON_ERROR_STOP=1", "--single-transaction", *renames)
    drop("_old")


def _restore_sqlite(stack: Stack, source: Path) -> None:
    now, new, old = (stack.folder / f"databases{suffix}" for suffix in ("", ".new", ".old"))
    new.mkdir(mode=0o700)
    for name in postgres.DATABASES:
        shutil.copyfile(source / f"{name}.db", new / f"{name}.db")
        with closing(sqlite3.connect(new / f"{name}.db")) as database:
            database.execute("pragma quick_check").fetchall()
    now.rename(old)
    new.rename(now)
    shutil.rmtree(old)


def _checked_manifest(stack: Stack, source: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((source / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{source / MANIFEST} does not exist, so {source} is not a complete backup; choose a "
                                "folder that 'make backup' wrote") from None
    if manifest["database"] != stack.database:
        raise ValueError(f"{source} is a backup of {manifest['database']}, but {stack.folder} uses {stack.database}: "
                         "restore it into a folder with that kind of database (runtime.yaml: services.folder and "
                         "services.database)")
    for name in postgres.DATABASES:
        path = source / f"{name}{SUFFIX[stack.database]}"
        if not path.exists() or sha256_of(path) != manifest["files"].get(path.name, {}).get("sha256"):
            raise ValueError(f"{path} is missing or differs from its digest in {MANIFEST}: the backup is damaged; use "
                             "another backup")
    return dict(manifest)
