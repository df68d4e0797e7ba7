"""What may go and what must stay: registered versions, what they carry, and runs that nobody needs."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onediff import tracking


@dataclass(frozen=True)
class Registered:
    """A registered version as housekeeping sees it: what it must not lose."""

    model: str
    version: str
    aliases: tuple[str, ...]
    tags: Mapping[str, str]
    run_id: str | None


def registered() -> list[Registered]:
    """Every version of every registered model at `tracking.uri()`."""
    store, found, token = tracking.client(), [], None
    while True:
        page = store.search_model_versions(max_results=200, page_token=token)
        found += page
        token = page.token
        if not token:
            break
    aliases = {name: store.get_registered_model(name).aliases for name in {item.name for item in found}}
    return [Registered(item.name, str(item.version), tuple(alias for alias, version in aliases[item.name].items()
                                                           if str(version) == str(item.version)),
                       dict(item.tags), item.run_id or None) for item in found]


def carried(version: Registered, folder: str) -> dict[str, str]:
    """Name -> text of the files that a version carries in a folder, nothing else of it fetched.

    Raises ValueError if it carries none, or they cannot be had.
    """
    store = tracking.client()
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    try:
        source = store.get_model_version(version.model, version.version).source or ""
        if source.startswith("models:/"):
            source = store.get_logged_model(source.removeprefix("models:/")).artifact_location
        with tempfile.TemporaryDirectory() as scratch:
            got = Path(download_artifacts(artifact_uri=f"{source}/{folder}", dst_path=scratch,
                                          tracking_uri=tracking.uri()))
            return {path.name: path.read_text(encoding="utf-8") for path in sorted(got.iterdir()) if path.is_file()}
    except (MlflowException, OSError) as error:
        raise ValueError(f"version {version.version} of '{version.model}': its {folder}/ cannot be read "
                         f"({tracking.first_line(error)})") from None


@dataclass(frozen=True)
class OldRun:
    id: str
    name: str
    started: str
    num_bytes: int  # of artifacts on this machine


def old_runs(days: float, keep: Iterable[str]) -> list[OldRun]:
    """Ended runs that began more than `days` ago, oldest first; not those of a family (a retraining and the runs below
    it) with a run that is kept, is younger, or still runs."""
    limit_ms = (time.time() - days * 86400) * 1000
    runs = {run.info.run_id: run for run in _all_runs()}

    def root(run_id: str) -> str:
        seen: set[str] = set()
        while run_id in runs and run_id not in seen:
            seen.add(run_id)
            run_id = runs[run_id].data.tags.get("mlflow.parentRunId", run_id)
        return run_id

    held = {root(run_id) for run_id in keep}
    held |= {root(run_id) for run_id, run in runs.items()
             if run.info.start_time > limit_ms or run.info.status in ("RUNNING", "SCHEDULED")}
    old = sorted((run for run_id, run in runs.items() if root(run_id) not in held), key=lambda run: run.info.start_time)
    return [OldRun(run.info.run_id, run.info.run_name or "", time.strftime("%Y-%m-%d", time.gmtime(
        run.info.start_time / 1000)), _local_bytes(run.info.artifact_uri)) for run in old]


def remove_runs(run_ids: Sequence[str]) -> bool:
    """Deletes runs with all they hold. False: the store is a server's, which has only marked them as deleted.

    Raises ValueError in MLflow's words.
    """
    store, address = tracking.client(), tracking.uri()
    from mlflow.exceptions import MlflowException

    try:
        for run_id in run_ids:
            if store.get_run(run_id).info.lifecycle_stage == "active":
                store.delete_run(run_id)
    except MlflowException as error:
        raise ValueError(f"MLflow at {tracking.without_password(address)}: {tracking.first_line(error)}") from None
    if address.startswith(tracking.SERVER):
        return False
    for first in range(0, len(run_ids), 100):
        command = [sys.executable, "-m", "mlflow", "gc", "--run-ids", ",".join(run_ids[first:first + 100])]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env={
            **os.environ, "MLFLOW_TRACKING_URI": address})  # not on the command line: it may hold a password
        if done.returncode:
            raise ValueError(f"mlflow gc: {' '.join(done.stderr.split())[-300:]}")
    return True


def _all_runs() -> Iterator[Any]:
    from mlflow.entities import ViewType

    token = None
    while True:
        page = tracking.client().search_runs([tracking.experiment_id()], run_view_type=ViewType.ALL, max_results=1000,
                                             page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _local_bytes(address: str) -> int:
    folder = Path(address.removeprefix("file://"))
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_absolute() else 0
