"""MLflow runs, which record the parameters, metrics, tags and files of training phases and evaluations.

Training continues if the MLflow server stops answering:

    tracking.check()                                    # raises before any work if the configured server is unreachable
    with tracking.phase_run("align", config) as run:
        fit(..., log=run.log)                           # run.log(step, {"loss": 1.2, ...}) returns without waiting
    write(run.describe(digest=...))
"""

import hashlib
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from onediff.config import Config
from onediff.files import sha256_of
from onediff.git import changed_files, head
from onediff.paths import CARD, DVC_LOCK, PARAMS
from onediff.tracking.connection import (
    check,
    client,
    experiment_id,
    first_line,
    mark_as_training,
    plain_errors,
    uri,
    without_password,
)

# The flow `retrain` stores its MLflow run id in this environment variable, so that later runs become its child runs.
PARENT = "ONEDIFF_PARENT_RUN"
SEND_EVERY_S = 5.0


class Run:
    """One MLflow run, used as a context manager.

    No method raises an exception when a request to MLflow fails; the list `problems` describes each failed request.
    Metrics stay in memory until a background thread has sent them, so a restarted MLflow server receives all of them.
    """

    def __init__(self, run_id: str, phase: str) -> None:
        self.id = run_id
        self.phase = phase
        self.problems: list[str] = []
        self._mlflow = client()
        self._address = uri()
        self._start = time.monotonic()
        self._seconds: float | None = None
        self._rates: list[float] = []
        self._waiting: list[Any] = []
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._unreachable = False
        self._status = "FINISHED"
        self._sender = threading.Thread(target=self._send_often, name="mlflow-metrics", daemon=True)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Queue the metrics of one training step for the background thread that sends them to MLflow."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        with self._lock:
            self._waiting += [Metric(key, float(value), now, step) for key, value in values.items() if key != "step"]
        if "pairs_per_s" in values:
            self._rates.append(float(values["pairs_per_s"]))

    def tag(self, values: Mapping[str, str]) -> None:
        """Set MLflow tags of the run."""
        from mlflow.entities import RunTag

        self._attempt("tags", self._mlflow.log_batch, tags=[RunTag(key, value) for key, value in values.items()])

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Upload a file, or a folder with all its files, as an artifact of this MLflow run.

        `folder` is the folder of the run into which they are uploaded. Raises FileNotFoundError if `path` is missing.
        """
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist, so it cannot be stored with MLflow run {self.id}: run "
                                    "'dvc repro' to create it")
        store = self._mlflow.log_artifacts if path.is_dir() else self._mlflow.log_artifact
        self._attempt(str(path), store, str(path), artifact_path=folder)

    def fail(self, reason: str) -> None:
        """Mark this MLflow run as failed, with a reason, although its `with` block ends without an exception."""
        self._status = "FAILED"
        self.tag({"failed_because": reason})

    def describe(self, *, digest: str) -> dict[str, Any]:
        """Return the facts about this MLflow run that are stored in data/runs/<phase>.json, such as run id and seconds.

        `digest` is the SHA-256 of the trained weights. It also becomes a tag of the run.
        """
        self.tag({"weights_digest": digest})
        seconds = self._seconds if self._seconds is not None else time.monotonic() - self._start
        return {"run_id": self.id, "tracking_uri": without_password(self._address), "phase": self.phase,
                "seconds": round(seconds, 1),
                "pairs_per_s": round(statistics.median(self._rates or [0.0]), 1), "digest": digest}

    def __enter__(self) -> Self:
        self._sender.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._seconds = time.monotonic() - self._start
        self._stop.set()
        self._sender.join()
        self._unreachable = not self._send()
        if self._waiting:
            self.problems.append(f"{len(self._waiting)} metrics could not be sent")
        if kind is not None:
            self._status = "FAILED" if issubclass(kind, Exception) else "KILLED"
        self._attempt("status", self._mlflow.set_terminated, self._status)
        if self.problems:
            print(f"MLflow run {self.id} ({self.phase}) is incomplete: {'; '.join(self.problems)}. "
                  "All results are on disk.", file=sys.stderr)

    def _send_often(self) -> None:
        while not self._stop.wait(SEND_EVERY_S):
            self._send()

    def _send(self) -> bool:
        """Send the queued metrics to MLflow, oldest first. Return True if all were sent, and False otherwise."""
        while self._waiting:
            batch = self._waiting[:1000]  # MLflow accepts at most 1000 metrics per request.
            if self._failure(self._mlflow.log_batch, metrics=batch):
                return False
            with self._lock:
                del self._waiting[:len(batch)]
        return True

    def _attempt(self, what: str, method: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        failure = ("not sent, because MLflow does not answer" if self._unreachable
                   else self._failure(method, *arguments, **options))
        if failure:
            self.problems.append(f"{what}: {failure}")

    def _failure(self, method: Callable[..., Any], *arguments: Any, **options: Any) -> str | None:
        """Call a method of MLflow's client for this run, and return None or the first line of the error message."""
        from mlflow.exceptions import MlflowException

        try:
            method(self.id, *arguments, **options)
        except (MlflowException, OSError, ValueError) as error:  # Failed uploads of artifacts raise OSError.
            return first_line(error)
        return None


@contextmanager
def parent_run(name: str, config: Config) -> Iterator[Run]:
    """Start the MLflow run of a retraining. It becomes the parent of all runs that start inside the `with` block.

    This also applies to runs in child processes.
    """
    with start_run(name, "flow", config) as run:
        os.environ[PARENT] = run.id
        try:
            yield run
        finally:
            del os.environ[PARENT]


def phase_run(phase: str, config: Config) -> Run:
    """Create the MLflow run of one training phase and return it, for use in a `with` statement.

    Raises ValueError if MLflow does not answer, so that the phase stops before any training.
    """
    return start_run(phase, "phase", config)


def start_run(name: str, kind: str, config: Config) -> Run:
    """Start an MLflow run, or continue an unfinished run that has the same name, parameters and data.

    `kind` is the value of the tag `kind`: flow, phase or evaluation. Raises ValueError if MLflow does not answer.
    """
    check()
    values = config.model_dump(mode="json")
    tags = {"mlflow.runName": _title(name), "kind": kind, **provenance()}
    tags["content"] = hashlib.sha256(json.dumps([name, values, tags["data_digest"]]).encode()).hexdigest()
    if os.environ.get(PARENT):
        tags["mlflow.parentRunId"] = os.environ[PARENT]
    with plain_errors():
        from mlflow.entities import Param

        mark_as_training(experiment_id())
        killed = find_run(f"tags.content = '{tags['content']}' and attributes.status = 'RUNNING'")
        run = Run(killed or client().create_run(experiment_id(), run_name=tags["mlflow.runName"]).info.run_id, name)
    run.tag({**tags, "resumed": "true"} if killed else tags)
    params = [Param(key, str(value)) for key, value in flatten(values).items()]
    for first in range(0, len(params), 100):  # MLflow accepts at most 100 parameters per request.
        run._attempt("parameters", run._mlflow.log_batch, params=params[first:first + 100])
    return run


def _title(name: str) -> str:
    """Return the run name that MLflow's page shows: `align` for a run of a retraining, else `align 2026-11-28 tiny`.

    The name ends with the preset that params.yaml equals, or with "own parameters" if params.yaml equals no preset.
    """
    if os.environ.get(PARENT):
        return name
    params = PARAMS.read_bytes() if PARAMS.exists() else b""
    presets = [path.stem for path in sorted(Path("presets").glob("*.yaml")) if path.read_bytes() == params]
    return f"{name} {date.today():%Y-%m-%d} {presets[0] if presets else 'own parameters'}"


def log_to_parent(values: Mapping[str, float]) -> None:
    """If this process is part of a retraining, log metrics to the MLflow run of the retraining too.

    MLflow's table of runs can then compare retrainings. Raises ConnectionError if the MLflow server does not answer.
    """
    parent = os.environ.get(PARENT)
    if parent is None:
        return
    with plain_errors():
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        client().log_batch(parent, metrics=[Metric(key, float(value), now, 0) for key, value in values.items()])


def find_run(condition: str) -> str | None:
    """Return the id of the newest MLflow run that matches a search condition of MLflow, or None if no run matches."""
    runs = client().search_runs([experiment_id()], condition, max_results=1)
    return str(runs[0].info.run_id) if runs else None


def provenance(root: Path = Path()) -> dict[str, str]:
    """Return MLflow tags that identify the code, the file dvc.lock and the data in the folder `root`.

    The tags are git_commit, git_dirty ("true" if files differ from the commit, else "false"), dvc_lock (SHA-256 of the
    file) and data_digest (SHA-256 of the data card). Without git or without the file, the value is "none".
    """
    commit = head(root)
    return {"git_commit": commit or "none",
            "git_dirty": str(bool(changed_files(root))).lower() if commit else "none",
            **{tag: sha256_of(root / path) if (root / path).exists() else "none"
               for tag, path in (("dvc_lock", DVC_LOCK), ("data_digest", CARD))}}


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested dicts into one dict with dotted keys: {"a": {"b": 1}} becomes {"a.b": 1}. Lists stay unchanged."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat
