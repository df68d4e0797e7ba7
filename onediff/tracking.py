"""Runs in MLflow: what was run, with what, how it went. Losing the server loses no training.

    tracking.check()                                    # a server that is set and does not answer stops us here
    with tracking.phase_run("align", config) as run:
        fit(..., log=run.log)                           # run.log(step, {"loss": 1.2, ...}) returns at once
    write(run.describe(digest=...))

With registry/ the only code that imports MLflow, and only inside functions: importing it takes seconds.
"""

from __future__ import annotations

import base64
import configparser
import hashlib
import json
import logging
import os
import re
import statistics
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from onediff.config import Config, load_runtime
from onediff.git import git, git_bytes, git_paths, head

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from requests import RequestException

EXPERIMENT = "onediff"
HOME = Path(".onediff")
PARENT = "ONEDIFF_PARENT_RUN"  # the flow sets it, stages below it nest their runs
SEND_EVERY_S = 5.0
SERVER = ("http://", "https://")
_DENIED = (401, 403)
_NO_FILTER = ("unspecified", "unset")
_OTHER_CREDENTIALS = ("MLFLOW_TRACKING_AUTH", "MLFLOW_TRACKING_AWS_SIGV4", "MLFLOW_TRACKING_CLIENT_CERT_PATH")
_DATABASE = ("sqlite:", "postgresql", "mysql", "mssql")
_QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true", "MLFLOW_LOGGING_LEVEL": "WARNING",
          "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true", "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
          "MLFLOW_HTTP_REQUEST_TIMEOUT": "20", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2"}


def uri() -> str:
    """Where runs are kept: MLFLOW_TRACKING_URI, else runtime.mlflow_uri, else SQLite in .onediff.

    Raises ValueError for an address that MLflow cannot keep runs at.
    """
    found = os.environ.get("MLFLOW_TRACKING_URI") or load_runtime().mlflow_uri
    if found is None:
        return f"sqlite:///{(HOME / 'mlflow.db').absolute()}"
    if not found.startswith(SERVER + _DATABASE):
        raise ValueError(f"MLflow address '{without_password(found)}': must be a server (http://, https://) or a "
                         "database (sqlite:///, postgresql://); correct MLFLOW_TRACKING_URI or runtime.mlflow_uri, or "
                         "unset both")
    return found


def where() -> str:
    """`uri()` as it may be shown: without user and password."""
    return without_password(uri())


def check() -> None:
    """Raises ValueError within seconds if a server is set and does not answer, or not to us. Imports no MLflow."""
    address = uri()
    if not address.startswith(SERVER):
        return
    server = without_password(address).rstrip("/")
    asked = [urllib.request.Request(f"{server}/health")]
    if not any(os.environ.get(name) for name in _OTHER_CREDENTIALS) and not Path("~/.netrc").expanduser().exists():
        asked.append(urllib.request.Request(f"{server}/api/2.0/mlflow/experiments/search?max_results=1",
                                            headers=_credentials(address)))  # /health is open to all
    try:
        for request in asked:
            urllib.request.urlopen(request, timeout=5).close()
    except urllib.error.HTTPError as error:
        if error.code in _DENIED:
            raise _denied(error.code) from None
        if error.code >= 500:
            raise _unreachable(address, f"it answers {error.code}") from None
    except (OSError, ValueError) as error:
        raise _unreachable(address, str(getattr(error, "reason", error))) from None


def _credentials(address: str) -> dict[str, str]:
    """The header by which MLflow's client says who we are: from the address, the environment or ~/.mlflow/credentials.
    """
    if os.environ.get("MLFLOW_TRACKING_TOKEN"):
        return {"Authorization": f"Bearer {os.environ['MLFLOW_TRACKING_TOKEN']}"}
    file = configparser.RawConfigParser()
    file.read(Path("~/.mlflow/credentials").expanduser())
    parts = urllib.parse.urlsplit(address)
    pair = [urllib.parse.unquote(part or "") or os.environ.get(f"MLFLOW_TRACKING_{key}")
            or file.get("mlflow", f"mlflow_tracking_{key.lower()}", fallback="")
            for key, part in (("USERNAME", parts.username), ("PASSWORD", parts.password))]
    if not any(pair):
        return {}
    return {"Authorization": f"Basic {base64.b64encode(':'.join(pair).encode()).decode()}"}


def http_status(error: MlflowException | RequestException) -> int:
    """What a server answered, or would have; 503 where none did. MLflow hands files over as requests' own errors."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        said = re.search(r"\b(4\d\d) Client Error", str(error))  # of a folder's files it tells in words only
        return int(said[1] if said else error.get_http_status_code())
    return 503 if error.response is None else error.response.status_code


def plain(error: MlflowException | RequestException) -> ValueError | ConnectionError:
    """MLflow's failure as one line: ConnectionError if its server may answer the next time, else ValueError."""
    status = http_status(error)
    if status in _DENIED and uri().startswith(SERVER):
        return _denied(status)
    kind = ConnectionError if status >= 500 else ValueError
    return kind(f"MLflow at {where()}: {without_password(' '.join(str(error).split()))[:300]}")


def _denied(status: int) -> ValueError:
    if status == 401:
        return ValueError(f"MLflow at {where()} does not know us (401): set MLFLOW_TRACKING_USERNAME and "
                          "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, to what its administrator gave you")
    user = os.environ.get("MLFLOW_TRACKING_USERNAME", "this user")
    return ValueError(f"MLflow at {where()} does not let {user} do this (403): ask its administrator for permission, "
                      "or set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD of one who may")


def _unreachable(address: str, reason: str) -> ValueError:
    return ValueError(f"MLflow at {without_password(address)} cannot be reached ({without_password(reason)}): start "
                      "it or correct MLFLOW_TRACKING_URI, or unset it to keep runs in .onediff/mlflow.db")


def quiet() -> None:
    """MLflow's settings for this process, before its first import: no telemetry, short waits. Set ones stay."""
    for key, value in _QUIET.items():
        os.environ.setdefault(key, value)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # or every retry of a lost server is a line


def client() -> MlflowClient:
    """The client of this process at `uri()`, made once. Raises ValueError if what keeps the runs does not answer."""
    return _client(uri())


@cache
def _client(address: str) -> MlflowClient:
    check()
    quiet()
    from mlflow import MlflowClient, set_tracking_uri
    from mlflow.exceptions import MlflowException

    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)  # it sets its own level when imported
    if address.startswith("sqlite:////"):
        Path(address.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    try:
        set_tracking_uri(address)  # logged models go through MLflow's own client, which would open ./mlflow.db
        opened = MlflowClient(address, registry_uri=address)
        opened.search_experiments(max_results=1)  # SQLite makes its tables here, once per process and store
    except MlflowException as error:
        if http_status(error) in _DENIED and address.startswith(SERVER):
            raise plain(error) from None
        raise _unreachable(address, first_line(error)) from None
    return opened


def experiment_id() -> str:
    """The experiment `onediff`, made if it is not there. Local stores keep artifacts beside the database."""
    store, address = client(), uri()
    from mlflow.exceptions import MlflowException

    found = store.get_experiment_by_name(EXPERIMENT)
    if found is None:
        beside = Path(address.removeprefix("sqlite:///")).parent if address.startswith("sqlite:///") else HOME
        local = None if address.startswith(SERVER) else (beside / "mlflow-artifacts").absolute().as_uri()
        try:
            return store.create_experiment(EXPERIMENT, artifact_location=local)
        except MlflowException:  # another process made it since we looked
            found = store.get_experiment_by_name(EXPERIMENT)
    if found is None or found.lifecycle_stage != "active":
        raise ValueError(f"MLflow at {where()}: experiment '{EXPERIMENT}' is deleted; restore it in the MLflow page")
    return str(found.experiment_id)


class Run:
    """One MLflow run, used as a context manager. No method raises when MLflow fails: what failed stands in `problems`.

    Metrics wait in memory and a thread sends them; those that fail wait for the next turn, so a server that comes
    back gets them all.
    """

    def __init__(self, run_id: str, phase: str) -> None:
        self.id = run_id
        self.phase = phase
        self.problems: list[str] = []
        self._store = client()
        self._address = uri()
        self._start = time.monotonic()
        self._seconds: float | None = None
        self._rates: list[float] = []
        self._waiting: list[Any] = []
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._gone = self._failed = False
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
        from mlflow.entities import RunTag

        tags = [RunTag(key, value) for key, value in values.items()]
        self._attempt("tags", partial(self._store.log_batch, self.id, tags=tags))

    def params(self, values: Mapping[str, Any]) -> None:
        """Parameters, flattened: {"align": {"steps": 3}} is `align.steps`."""
        from mlflow.entities import Param

        items = [Param(key, str(value)) for key, value in flatten(values).items()]
        for first in range(0, len(items), 100):  # MLflow takes 100 at once
            part = items[first:first + 100]
            self._attempt("parameters", partial(self._store.log_batch, self.id, params=part))

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """A file, or a folder with all in it, kept with the run."""
        if not path.exists():
            raise FileNotFoundError(f"{path} not found: nothing to keep with run {self.id}; 'dvc repro' makes it")
        keep = self._store.log_artifacts if path.is_dir() else self._store.log_artifact
        self._attempt(str(path), partial(keep, self.id, str(path), folder))

    def fail(self, reason: str) -> None:
        """Ends the run as failed where no exception says so."""
        self._failed = True
        self.tag({"failed_because": reason})

    def describe(self, *, digest: str) -> dict[str, Any]:
        """What data/runs/<phase>.json holds; `digest` is the sha256 of the weights, and tagged on the run."""
        self.tag({"weights_digest": digest})
        seconds = self._seconds if self._seconds is not None else time.monotonic() - self._start
        rate = statistics.median(self._rates) if self._rates else 0.0
        return {"run_id": self.id, "tracking_uri": without_password(self._address), "phase": self.phase,
                "seconds": round(seconds, 1), "pairs_per_s": round(rate, 1), "digest": digest}

    def __enter__(self) -> Self:
        self._sender.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._seconds = time.monotonic() - self._start
        self._stop.set()
        self._sender.join()
        self._gone = not self._send() or self._gone
        if self._waiting:
            self.problems.append(f"{len(self._waiting)} metrics not sent")
        status = "FAILED" if self._failed else "FINISHED"
        if kind is not None:
            status = "FAILED" if issubclass(kind, Exception) else "KILLED"
        self._attempt("status", partial(self._store.set_terminated, self.id, status))
        if self.problems:
            print(f"MLflow run {self.id} ({self.phase}) is incomplete: {'; '.join(self.problems)}. "
                  "What was computed is on disk.", file=sys.stderr)

    def _send_often(self) -> None:
        while not self._stop.wait(SEND_EVERY_S):
            self._send()

    def _send(self) -> bool:
        """Sends what waits, oldest first; False if some of it could not be sent and waits on."""
        while self._waiting:
            part = self._waiting[:1000]  # MLflow takes 1000 at once
            if self._failure(partial(self._store.log_batch, self.id, metrics=part)):
                return False
            with self._lock:
                del self._waiting[:len(part)]
        return True

    def _attempt(self, what: str, call: Callable[[], Any]) -> None:
        failure = "not tried, MLflow is gone" if self._gone else self._failure(call)
        if failure:
            self.problems.append(f"{what}: {failure}")

    def _failure(self, call: Callable[[], Any]) -> str | None:
        from mlflow.exceptions import MlflowException

        try:
            call()
        except (MlflowException, OSError, ValueError) as error:  # OSError: artifacts
            return first_line(error)
        return None


@contextmanager
def parent_run(name: str, config: Config) -> Iterator[Run]:
    """The run of a whole retraining; runs started below it, in this process or its children, nest under it."""
    before = os.environ.pop(PARENT, None)
    with _start(name, "flow", config) as run:
        os.environ[PARENT] = run.id
        try:
            yield run
        finally:
            os.environ.pop(PARENT)
            if before is not None:
                os.environ[PARENT] = before


@contextmanager
def phase_run(phase: str, config: Config) -> Iterator[Run]:
    """The run of one training phase."""
    with _start(phase, "phase", config) as run:
        yield run


@contextmanager
def evaluation_run(name: str, config: Config) -> Iterator[Run]:
    with _start(name, "evaluation", config) as run:
        yield run


def log_evaluation(config: Config, *, data: Path = Path("data"), num_pictures: int = 4) -> str:
    """Keeps scores, report and sample pictures of the pipeline's results; returns the run's id.

    The same results are kept once: a finished run with the same scores is returned as it is.
    """
    tests, gates = (_read_scores(data / name) for name in ("metrics.json", "gate.json"))
    harder = _read_scores(data / "stress.json") if (data / "stress.json").exists() else {}  # `evaluate` makes none
    key = hashlib.sha256(json.dumps([tests, gates, *filter(None, [harder])], sort_keys=True).encode()).hexdigest()
    known = _find(f"tags.scores_digest = '{key}' and attributes.status = 'FINISHED'")
    if known:
        return known
    with evaluation_run("evaluate", config) as run, tempfile.TemporaryDirectory() as scratch:
        run.log(0, {**_numbers("test", tests), **_numbers("gate", gates), **_numbers("stress", harder)})
        for name in ("metrics.json", "gate.json", "stress.json", "report.html", "diffcap/card.json"):
            if (data / name).exists():
                run.artifact(data / name)
        _draw_samples(data, Path(scratch), num_pictures)
        run.artifact(Path(scratch), "pictures")
        if not run.problems:
            run.tag({"scores_digest": key})
    return run.id


def provenance(root: Path = Path()) -> dict[str, str]:
    """Tags that say from what a run or version was made: code, dvc.lock and data. 'none' where there is none."""
    commit = head(root)
    dirty = str(bool(changed_files(root))).lower() if commit else "none"
    return {"git_commit": commit or "none", "git_dirty": dirty, "dvc_lock": _digest(root / "dvc.lock"),
            "data_digest": _digest(root / "data/diffcap/card.json")}


def changed_files(root: Path = Path()) -> list[str]:
    """What differs from the commit: changed files, code that git does not track, and files whose changes git was told
    to overlook or hides by a filter. dvc.lock and data do not count: the pipeline itself writes them.
    """
    if head(root) is None:
        return []
    outside = ("--", ".", ":!dvc.lock", ":!data")
    changed = git_paths("diff", "--relative", "--name-only", "HEAD", *outside, root=root)
    untracked = git_paths("ls-files", "--others", "--exclude-standard", "--", "onediff/*.py", "flows/*.py", root=root)
    overlooked = [line[2:] for line in git_paths("ls-files", "-v", *outside, root=root)
                  if (line[0].islower() or line[0] == "S") and (root / line[2:]).exists()]
    return list(dict.fromkeys([*changed, *untracked, *overlooked, *_hidden_by_filters(root)]))


def _hidden_by_filters(root: Path) -> list[str]:
    """Code and settings that have a filter in git's attributes and other bytes than in the commit."""
    paths = git_paths("ls-files", "--", "*.py", "*.yaml", root=root)
    if not paths:
        return []
    found = git_paths("check-attr", "filter", "--", *paths, root=root)  # path, "filter", value; and so on
    filtered = [path for path, value in zip(found[::3], found[2::3], strict=True) if value not in _NO_FILTER]
    return [path for path in filtered if (root / path).exists()
            and (root / path).read_bytes() != git_bytes("show", f":./{path}", root=root)]


def branch(root: Path = Path()) -> str:
    """The git branch that is checked out; empty if there is none."""
    return git("branch", "--show-current", root=root) if head(root) else ""


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; lists stay whole."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _start(name: str, kind: str, config: Config) -> Run:
    """Opens a run; one that was killed with the same parameters and data goes on.

    Raises ValueError, while nothing is trained yet, if MLflow does not answer.
    """
    check()
    quiet()
    from mlflow.exceptions import MlflowException

    values = config.model_dump(mode="json")
    tags = {"mlflow.runName": name, "kind": kind, **provenance()}
    tags["content"] = hashlib.sha256(json.dumps([name, values, tags["data_digest"]]).encode()).hexdigest()
    if os.environ.get(PARENT):
        tags["mlflow.parentRunId"] = os.environ[PARENT]
    try:
        killed = _find(f"tags.content = '{tags['content']}' and attributes.status = 'RUNNING'")
        run = Run(killed or client().create_run(experiment_id(), run_name=name).info.run_id, name)
    except MlflowException as error:
        raise _unreachable(uri(), first_line(error)) from None
    run.tag({**tags, "resumed": "true"} if killed else tags)
    run.params(values)
    return run


def _find(condition: str) -> str | None:
    """The newest run that meets the condition."""
    runs = client().search_runs([experiment_id()], condition, max_results=1)
    return str(runs[0].info.run_id) if runs else None


def _read_scores(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} not found: 'dvc repro' makes it") from None


def _numbers(split: str, scores: Mapping[str, Any]) -> dict[str, float]:
    return {f"{split}/{key}": value for key, value in flatten(scores).items()
            if isinstance(value, (int, float)) and not key.count(".floor.")}


def _draw_samples(data: Path, folder: Path, num_pictures: int) -> None:
    """The first test pairs of each source, before and after side by side, reference and prediction below."""
    import io

    from PIL import Image, ImageDraw

    from onediff.data.record import read_records

    drawn: dict[str, int] = {}
    predictions = {row["pair_id"]: row["prediction"] for path in sorted((data / "captions/test").glob("*.jsonl"))
                   for row in map(json.loads, path.read_text().splitlines())}
    for record in read_records(data / "diffcap", "test-*.parquet"):
        count = drawn.setdefault(record.source, 0)
        if count == num_pictures:
            continue
        drawn[record.source] += 1
        page = Image.new("RGB", (800, 450), "white")
        for column, image in enumerate((record.before, record.after)):
            page.paste(Image.open(io.BytesIO(image)).convert("RGB").resize((395, 395)), (column * 405, 0))
        ImageDraw.Draw(page).text((8, 402), f"reference: {record.references[0]}\n"
                                  f"prediction: {predictions.get(record.pair_id, '-')}", fill="black", font_size=16)
        page.save(folder / f"{record.source}-{count}.png")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else "none"


def without_password(address: str) -> str:
    return re.sub(r"//[^/\s]*@", "//", address)


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
