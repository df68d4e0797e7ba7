"""MLflow runs: parameters, metrics, tags and files of training phases and evaluations. A lost server loses no training.

    tracking.check()                                    # stops before any work if a server is set and does not answer
    with tracking.phase_run("align", config) as run:
        fit(..., log=run.log)                           # run.log(step, {"loss": 1.2, ...}) returns at once
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
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from onediff.config import Config
from onediff.files import sha256_of
from onediff.git import changed_files, head
from onediff.paths import CARD, DVC_LOCK
from onediff.tracking.connection import (
    check,
    client,
    experiment_id,
    first_line,
    plain_errors,
    uri,
    without_password,
)

PARENT = "ONEDIFF_PARENT_RUN"  # set by the flow: the run under which the runs of its stages nest
SEND_EVERY_S = 5.0


class Run:
    """One MLflow run, used as a context manager. No method raises when MLflow fails; `problems` lists what failed.

    Metrics wait in memory and a thread sends them. Those that fail wait for the next attempt, so a server that comes
    back gets all of them.
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
        """Metrics of one step; returns at once."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        with self._lock:
            self._waiting += [Metric(key, float(value), now, step) for key, value in values.items() if key != "step"]
        if "pairs_per_s" in values:
            self._rates.append(float(values["pairs_per_s"]))

    def tag(self, values: Mapping[str, str]) -> None:
        """Sets tags of the run."""
        from mlflow.entities import RunTag

        self._attempt("tags", self._mlflow.log_batch, tags=[RunTag(key, value) for key, value in values.items()])

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Stores a file, or a folder with everything in it, with the run."""
        if not path.exists():
            raise FileNotFoundError(f"{path} not found: nothing to keep with run {self.id}; 'dvc repro' makes it")
        store = self._mlflow.log_artifacts if path.is_dir() else self._mlflow.log_artifact
        self._attempt(str(path), store, str(path), artifact_path=folder)

    def fail(self, reason: str) -> None:
        """Marks the run as failed where no exception does."""
        self._status = "FAILED"
        self.tag({"failed_because": reason})

    def describe(self, *, digest: str) -> dict[str, Any]:
        """The content of data/runs/<phase>.json. `digest`: the SHA-256 of the weights, also set as a tag of the run."""
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
            self.problems.append(f"{len(self._waiting)} metrics not sent")
        if kind is not None:
            self._status = "FAILED" if issubclass(kind, Exception) else "KILLED"
        self._attempt("status", self._mlflow.set_terminated, self._status)
        if self.problems:
            print(f"MLflow run {self.id} ({self.phase}) is incomplete: {'; '.join(self.problems)}. "
                  "What was computed is on disk.", file=sys.stderr)

    def _send_often(self) -> None:
        while not self._stop.wait(SEND_EVERY_S):
            self._send()

    def _send(self) -> bool:
        """Sends the waiting metrics, oldest first. False if some of them could not be sent."""
        while self._waiting:
            batch = self._waiting[:1000]  # MLflow takes at most 1000 at once
            if self._failure(self._mlflow.log_batch, metrics=batch):
                return False
            with self._lock:
                del self._waiting[:len(batch)]
        return True

    def _attempt(self, what: str, method: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        failure = ("not tried, MLflow is gone" if self._unreachable
                   else self._failure(method, *arguments, **options))
        if failure:
            self.problems.append(f"{what}: {failure}")

    def _failure(self, method: Callable[..., Any], *arguments: Any, **options: Any) -> str | None:
        """Calls a method of the client for this run. Gives the first line of its error, or None."""
        from mlflow.exceptions import MlflowException

        try:
            method(self.id, *arguments, **options)
        except (MlflowException, OSError, ValueError) as error:  # OSError: artifacts
            return first_line(error)
        return None


@contextmanager
def parent_run(name: str, config: Config) -> Iterator[Run]:
    """The run of a retraining. Runs that start inside it, in this process or its children, nest under it."""
    with start_run(name, "flow", config) as run:
        os.environ[PARENT] = run.id
        try:
            yield run
        finally:
            del os.environ[PARENT]


def phase_run(phase: str, config: Config) -> Run:
    """The run of one training phase, to be used as a context manager. Raises as `start_run`."""
    return start_run(phase, "phase", config)


def start_run(name: str, kind: str, config: Config) -> Run:
    """Starts a run, or continues one that was killed with the same parameters and data.

    Raises ValueError, before any training, if MLflow does not answer.
    """
    check()
    values = config.model_dump(mode="json")
    tags = {"mlflow.runName": name, "kind": kind, **provenance()}
    tags["content"] = hashlib.sha256(json.dumps([name, values, tags["data_digest"]]).encode()).hexdigest()
    if os.environ.get(PARENT):
        tags["mlflow.parentRunId"] = os.environ[PARENT]
    with plain_errors():
        from mlflow.entities import Param

        killed = find_run(f"tags.content = '{tags['content']}' and attributes.status = 'RUNNING'")
        run = Run(killed or client().create_run(experiment_id(), run_name=name).info.run_id, name)
    run.tag({**tags, "resumed": "true"} if killed else tags)
    params = [Param(key, str(value)) for key, value in flatten(values).items()]
    for first in range(0, len(params), 100):  # MLflow takes at most 100 at once
        run._attempt("parameters", run._mlflow.log_batch, params=params[first:first + 100])
    return run


def find_run(condition: str) -> str | None:
    """The id of the newest run that meets the condition, or None."""
    runs = client().search_runs([experiment_id()], condition, max_results=1)
    return str(runs[0].info.run_id) if runs else None


def provenance(root: Path = Path()) -> dict[str, str]:
    """Tags with the code, dvc.lock and data from which a run or version was made; 'none' where there is none."""
    commit = head(root)
    return {"git_commit": commit or "none",
            "git_dirty": str(bool(changed_files(root))).lower() if commit else "none",
            **{tag: sha256_of(root / path) if (root / path).exists() else "none"
               for tag, path in (("dvc_lock", DVC_LOCK), ("data_digest", CARD))}}


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; lists are not flattened."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat
