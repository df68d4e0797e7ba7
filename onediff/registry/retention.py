"""Queries for housekeeping: all registered versions, the files of a version, and MLflow runs to remove."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from onediff import tracking
from onediff.registry.store import ModelVersion


def registered() -> list[ModelVersion]:
    """Return all versions of all registered models in the MLflow store, with their aliases."""
    mlflow = tracking.client()
    versions = list(tracking.all_pages(mlflow.search_model_versions, max_results=200))
    aliases = {name: mlflow.get_registered_model(name).aliases for name in {version.name for version in versions}}
    for version in versions:  # MLflow's search returns versions without their aliases, so they are added here.
        version.aliases = [alias for alias, number in aliases[version.name].items()
                           if str(number) == str(version.version)]
    return versions


def carried(version: ModelVersion, folder: str) -> dict[str, str]:
    """Return a dict from the name to the text of each file in one folder of a registered version.

    Only this folder is downloaded. Raises ValueError if the version has no such folder, or if a file cannot be read.
    """
    mlflow = tracking.client()
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    try:
        source = version.source or ""
        if source.startswith("models:/"):
            source = mlflow.get_logged_model(source.removeprefix("models:/")).artifact_location
        with tempfile.TemporaryDirectory() as scratch:
            files = Path(download_artifacts(artifact_uri=f"{source}/{folder}", dst_path=scratch,
                                            tracking_uri=tracking.uri()))
            return {path.name: path.read_text(encoding="utf-8") for path in sorted(files.iterdir()) if path.is_file()}
    except (MlflowException, OSError) as error:
        raise ValueError(f"version {version.version} of '{version.name}': its folder {folder}/ cannot be read "
                         f"({tracking.first_line(error)}): restore the files, or register the model again") from None


def old_runs(days: float, keep: Iterable[str]) -> dict[str, int]:
    """Return the ids of MLflow runs that may be removed, oldest first, with the size of their local files in bytes.

    These runs have ended, started more than `days` days ago, and are not in `keep`. A retraining and its child runs
    are returned only if this is true for all of them.
    """
    from mlflow.entities import ViewType

    limit_ms = (time.time() - days * 86400) * 1000
    runs = {run.info.run_id: run for run in tracking.all_pages(
        tracking.client().search_runs, [tracking.experiment_id()], run_view_type=ViewType.ALL, max_results=1000)}

    def root(run_id: str) -> str:
        seen: set[str] = set()
        while run_id in runs and run_id not in seen:
            seen.add(run_id)
            run_id = runs[run_id].data.tags.get("mlflow.parentRunId", run_id)
        return run_id

    needed = {root(run_id) for run_id in keep}
    needed |= {root(run_id) for run_id, run in runs.items()
               if run.info.start_time > limit_ms or run.info.status in ("RUNNING", "SCHEDULED")}
    old = sorted((run.info for run_id, run in runs.items() if root(run_id) not in needed),
                 key=lambda info: info.start_time)
    folders = {info.run_id: Path(info.artifact_uri.removeprefix("file://")) for info in old}
    return {run_id: sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            if folder.is_absolute() else 0 for run_id, folder in folders.items()}


@tracking.plain_errors()
def remove_runs(run_ids: Sequence[str]) -> bool:
    """Delete MLflow runs with their metrics, parameters and files, and return True; return False for an MLflow server.

    On a server, the runs are only marked as deleted. Raises ValueError with the message of `mlflow gc` if this command
    fails.
    """
    mlflow, address = tracking.client(), tracking.uri()
    for run_id in run_ids:
        if mlflow.get_run(run_id).info.lifecycle_stage == "active":
            mlflow.delete_run(run_id)
    if address.startswith(tracking.SERVER):
        return False
    for first in range(0, len(run_ids), 100):
        done = subprocess.run(
            [sys.executable, "-m", "mlflow", "gc", "--run-ids", ",".join(run_ids[first:first + 100])],
            # MLflow's address may contain a password, so it is not on the command line, which other users can read.
            env={**os.environ, "MLFLOW_TRACKING_URI": address},
            capture_output=True, text=True, check=False)
        if done.returncode:
            raise ValueError(f"'mlflow gc' could not delete the runs ({' '.join(done.stderr.split())[-300:]}): correct "
                             "the cause, then run 'make gc YES=1' again")
    return True
