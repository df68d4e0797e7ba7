"""Backup, restore, schema upgrade and purge of the databases `prefect` and `mlflow`, whichever kind they are.

MLflow's artifacts are files beside them (`mlflow/artifacts`, or S3): copy those as any other files.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from flows.services import background, postgres
from flows.services import topology as plan
from flows.services.topology import Place

MANIFEST = "manifest.json"
SUFFIX = {"postgresql": ".dump", "sqlite": ".db"}


def backup(where: Place, target: Path) -> str:
    """Both databases into a new folder, also while the servers run; the folder gets its name when it is whole.

    Raises ValueError if the folder holds something already, or there is nothing to keep.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} holds something already: name a new folder")
    part = target.with_name(f"{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True, mode=0o700)
    with _database_up(where):
        for name in postgres.NAMES:
            _dump(where, name, part / f"{name}{SUFFIX[where.database]}")
    names = [path.name for path in sorted(part.iterdir())]
    files = {name: {"bytes": (part / name).stat().st_size, "sha256": _digest(part / name)} for name in names}
    said = {"made": datetime.now(UTC).isoformat(timespec="seconds"), "database": where.database,
            "versions": {name: version(name) for name in postgres.NAMES}, "files": files}
    (part / MANIFEST).write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
    if target.exists():
        target.rmdir()
    part.rename(target)
    return (f"{target}: {', '.join(names)} ({sum((target / name).stat().st_size for name in names) / 2**20:.1f} MB); "
            f"MLflow's artifacts are not in it: copy {where.folder / 'mlflow/artifacts'} too")


def restore(where: Place, source: Path) -> str:
    """Both databases as they were in the backup, or, if anything fails, as they are.

    Raises ValueError while the servers run, or if the backup is not whole, or of another kind of database.
    """
    _refuse_while_running(where, f"python -m flows.services restore {source}")
    said = _checked_manifest(where, source)
    plan.begin(where)
    finish_restore(where)
    if where.database == "postgresql":
        with _database_up(where):
            _restore_postgres(where, source)
    else:
        _restore_sqlite(where, source)
    return f"{where.folder}: as of {said['made']}; 'make services' starts it"


def upgrade(where: Place) -> str:
    """Schemas as the installed Prefect and MLflow want them, after a backup. Raises ValueError if one fails."""
    _refuse_while_running(where, "make upgrade")
    plan.begin(where)
    finish_restore(where)
    kept = where.folder / "backups" / datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
    said = [backup(where, kept)]
    commands = {"mlflow": ["db", "upgrade", where.database_address("mlflow")],
                "prefect": ["--no-prompt", "server", "database", "upgrade", "-y"]}
    with _database_up(where):
        for name, arguments in commands.items():
            done = subprocess.run([sys.executable, "-m", name, *arguments], env=plan.server_env(where, name),
                                  cwd=where.folder / name, capture_output=True, text=True, check=False)
            if done.returncode:
                raise ValueError(f"{name} {version(name)} cannot upgrade its database: "
                                 f"{' '.join((done.stderr or done.stdout).split())[-500:]}; "
                                 f"back to what was: python -m flows.services restore {kept}")
            said.append(f"{name}: schema of version {version(name)}")
    return "\n".join(said)


def purge(where: Place, runs: Sequence[str]) -> str:
    """Runs that the server has marked as deleted go for good, with their artifacts. The server must run."""
    command = [sys.executable, "-m", "mlflow", "gc", "--backend-store-uri", where.database_address("mlflow"),
               "--run-ids", ",".join(runs)]
    done = subprocess.run(command, env={**plan.worker_env(where), **plan.server_env(where, "mlflow")},
                          cwd=where.folder / "mlflow", capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"mlflow gc: {' '.join(done.stderr.split())[-300:]}")
    return f"{len(runs)} runs are gone from the MLflow server for good"


def finish_restore(where: Place) -> None:
    """A restore of SQLite files that was killed between its two renames is undone."""
    now, old = where.folder / "databases", where.folder / "databases.old"
    if old.exists() and not now.exists():
        old.rename(now)
    for beside in (old, where.folder / "databases.new"):
        shutil.rmtree(beside, ignore_errors=True)


def _refuse_while_running(where: Place, again: str) -> None:
    for name in postgres.NAMES:
        if background.running(where.folder, name):
            raise ValueError(f"{where.folder}: the {name} server runs: 'make services-stop', then {again}")


def _database_up(where: Place) -> AbstractContextManager[None]:
    ports = where.runtime.services
    return (postgres.up(where.folder, ports.postgres_port, ports.start_s) if where.database == "postgresql"
            else nullcontext())


def _dump(where: Place, name: str, target: Path) -> None:
    if where.database == "postgresql":
        postgres.tool(where.folder, where.runtime.services.postgres_port, "pg_dump", "-Fc", "-f", str(target), name)
        target.chmod(0o600)
        return
    kept = where.folder / "databases" / f"{name}.db"
    if not kept.exists():
        raise ValueError(f"{kept} not found: nothing to keep; 'make services' makes it")
    with closing(sqlite3.connect(kept)) as old, closing(sqlite3.connect(target)) as new:
        old.backup(new)  # a consistent state, while others write


def _restore_postgres(where: Place, source: Path) -> None:
    """Beside the old databases, which change names with the new ones in one transaction."""
    port, folder = where.runtime.services.postgres_port, where.folder

    def drop(suffix: str) -> None:
        for name in postgres.NAMES:
            postgres.tool(folder, port, "dropdb", "--if-exists", "--force", f"{name}{suffix}")

    drop("_new")
    drop("_old")
    for name in postgres.NAMES:
        postgres.tool(folder, port, "createdb", f"{name}_new")
        postgres.tool(folder, port, "pg_restore", "--exit-on-error", "--no-owner", "-d", f"{name}_new",
                      str(source / f"{name}.dump"))
    renames = [command for name in postgres.NAMES
               for command in ("-c", f"alter database {name} rename to {name}_old",
                               "-c", f"alter database {name}_new rename to {name}")]
    postgres.tool(folder, port, "psql", "-d", "postgres", "-v", "ON_ERROR_STOP=1", "--single-transaction", *renames)
    drop("_old")


def _restore_sqlite(where: Place, source: Path) -> None:
    now, new, old = (where.folder / f"databases{suffix}" for suffix in ("", ".new", ".old"))
    new.mkdir(mode=0o700)
    for name in postgres.NAMES:
        shutil.copyfile(source / f"{name}.db", new / f"{name}.db")
        with closing(sqlite3.connect(new / f"{name}.db")) as opened:
            opened.execute("pragma quick_check").fetchall()
    now.rename(old)
    new.rename(now)
    shutil.rmtree(old)


def _checked_manifest(where: Place, source: Path) -> dict[str, Any]:
    try:
        said = json.loads((source / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{source / MANIFEST} not found: {source} is no backup, or not a whole one") from None
    if said["database"] != where.database:
        raise ValueError(f"{source} is a backup of {said['database']}, but {where.folder} keeps {where.database}: "
                         "restore into a folder that began with the same kind (services.folder, services.database)")
    for name in postgres.NAMES:
        path = source / f"{name}{SUFFIX[where.database]}"
        if not path.exists() or _digest(path) != said["files"].get(path.name, {}).get("sha256"):
            raise ValueError(f"{path} is not as {MANIFEST} says: the backup is damaged; take another one")
    return dict(said)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
