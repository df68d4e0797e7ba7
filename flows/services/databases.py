"""Backup, restore, schema upgrade and purge of the databases `prefect` and `mlflow`, in PostgreSQL or SQLite.

MLflow's artifacts are files beside them (`mlflow/artifacts`, or S3): copy those as any other files.
"""

from __future__ import annotations

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
from flows.services.topology import Place
from onediff.files import new_folder, sha256_of, write_json

MANIFEST = "manifest.json"
SUFFIX = {"postgresql": ".dump", "sqlite": ".db"}


def backup(where: Place, target: Path) -> str:
    """Writes both databases into a new folder, also while the servers run. The folder is complete or absent.

    Raises ValueError if the folder is not empty, or if there is no database yet.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} holds something already: name a new folder")
    with new_folder(target) as part:
        part.chmod(0o700)
        with _database_up(where):
            for name in postgres.DATABASES:
                _dump(where, name, part / f"{name}{SUFFIX[where.database]}")
        files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
                 for path in sorted(part.iterdir())}
        manifest = {"made": datetime.now(UTC).isoformat(timespec="seconds"), "database": where.database,
                    "versions": {name: version(name) for name in postgres.DATABASES}, "files": files}
        write_json(part / MANIFEST, manifest, indent=2)
    return (f"{target}: {', '.join(files)} ({sum((target / name).stat().st_size for name in files) / 2**20:.1f} MB); "
            f"MLflow's artifacts are not in it: copy {where.folder / 'mlflow/artifacts'} too")


def restore(where: Place, source: Path) -> str:
    """Restores both databases from the backup; if one fails, both stay unchanged.

    Raises ValueError while the servers run, or if the backup is damaged or of the other kind of database.
    """
    _refuse_while_running(where, f"python -m flows.services restore {source}")
    manifest = _checked_manifest(where, source)
    topology.begin(where)
    if where.database == "postgresql":
        with _database_up(where):
            _restore_postgres(where, source)
    else:
        _restore_sqlite(where, source)
    return f"{where.folder}: as of {manifest['made']}; 'make services' starts it"


def upgrade(where: Place) -> str:
    """Upgrades both schemas to the installed Prefect and MLflow, after a backup. Raises ValueError if one fails."""
    _refuse_while_running(where, "make upgrade")
    topology.begin(where)
    target = where.folder / "backups" / datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
    lines = [backup(where, target)]
    commands = {"mlflow": (topology.mlflow_env(where), ["db", "upgrade", where.database_address("mlflow")]),
                "prefect": (topology.prefect_env(where), ["--no-prompt", "server", "database", "upgrade", "-y"])}
    with _database_up(where):
        for name, (env, arguments) in commands.items():
            run_tool([sys.executable, "-m", name, *arguments],
                     f"{name} {version(name)} cannot upgrade its database ('python -m flows.services restore {target}' "
                     "brings the old one back)", env=env, folder=where.folder / name)
            lines.append(f"{name}: schema of version {version(name)}")
    return "\n".join(lines)


def purge(where: Place, runs: Sequence[str]) -> str:
    """Removes runs that the server has marked as deleted, with their artifacts. The server must run."""
    command = [sys.executable, "-m", "mlflow", "gc", "--backend-store-uri", where.database_address("mlflow"),
               "--run-ids", ",".join(runs)]
    run_tool(command, "mlflow gc", env=topology.worker_env(where) | topology.mlflow_env(where),
             folder=where.folder / "mlflow")
    return f"{len(runs)} runs are gone from the MLflow server for good"


def _refuse_while_running(where: Place, again: str) -> None:
    for name in postgres.DATABASES:
        if background.running(where.folder, name):
            raise ValueError(f"{where.folder}: the {name} server runs: 'make services-stop', then {again}")


@contextmanager
def _database_up(where: Place) -> Iterator[None]:
    """PostgreSQL runs inside the block: the server that runs already, or one that is started for the block only."""
    if where.database == "sqlite" or background.running(where.folder, "postgres"):
        yield
        return
    settings = where.runtime.services
    postgres.start(where.folder, settings.postgres_port, settings.start_s)
    try:
        yield
    finally:
        background.end(where.folder, "postgres")


def _dump(where: Place, name: str, target: Path) -> None:
    if where.database == "postgresql":
        postgres.tool(where.folder, where.runtime.services.postgres_port, "pg_dump", "-Fc", "-f", str(target), name)
        target.chmod(0o600)
        return
    database = where.folder / "databases" / f"{name}.db"
    if not database.exists():
        raise ValueError(f"{database} not found: nothing to keep; 'make services' makes it")
    with closing(sqlite3.connect(database)) as old, closing(sqlite3.connect(target)) as new:
        old.backup(new)  # a consistent state, while others write


def _restore_postgres(where: Place, source: Path) -> None:
    """Restores beside the old databases; then one transaction exchanges the names."""
    port, folder = where.runtime.services.postgres_port, where.folder

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


def _restore_sqlite(where: Place, source: Path) -> None:
    now, new, old = (where.folder / f"databases{suffix}" for suffix in ("", ".new", ".old"))
    new.mkdir(mode=0o700)
    for name in postgres.DATABASES:
        shutil.copyfile(source / f"{name}.db", new / f"{name}.db")
        with closing(sqlite3.connect(new / f"{name}.db")) as database:
            database.execute("pragma quick_check").fetchall()
    now.rename(old)
    new.rename(now)
    shutil.rmtree(old)


def _checked_manifest(where: Place, source: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((source / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{source / MANIFEST} not found: {source} is no backup, or not a whole one") from None
    if manifest["database"] != where.database:
        raise ValueError(f"{source} is a backup of {manifest['database']}, but {where.folder} keeps {where.database}: "
                         "restore into a folder that began with the same kind (services.folder, services.database)")
    for name in postgres.DATABASES:
        path = source / f"{name}{SUFFIX[where.database]}"
        if not path.exists() or sha256_of(path) != manifest["files"].get(path.name, {}).get("sha256"):
            raise ValueError(f"{path} is not as {MANIFEST} says: the backup is damaged; take another one")
    return dict(manifest)
