"""The connection to MLflow: the address of the store, the client, and one-line errors for failed requests.

Only onediff/tracking, onediff/registry and the MLflow model in onediff/serve/pyfunc.py import MLflow. They import it
inside functions, because the import takes seconds.
"""

from __future__ import annotations

import base64
import configparser
import logging
import os
import re
import sqlite3
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onediff.config import load_runtime

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from requests import RequestException

EXPERIMENT = "onediff"
# With this tag, MLflow's web page shows the experiment as model training; without it, perhaps as chat traces.
KIND = ("mlflow.experimentKind", "custom_model_development")
HOME = Path(".onediff")
SERVER = ("http://", "https://")
_DENIED = (401, 403)
_DAMAGE = re.compile("database disk image is malformed|file is not a database")  # messages of SQLite
_OTHER_CREDENTIALS = ("MLFLOW_TRACKING_AUTH", "MLFLOW_TRACKING_AWS_SIGV4", "MLFLOW_TRACKING_CLIENT_CERT_PATH")
_QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true", "MLFLOW_LOGGING_LEVEL": "WARNING",
          "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true", "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
          "MLFLOW_HTTP_REQUEST_TIMEOUT": "20", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2"}


def uri() -> str:
    """Return the address of the MLflow server or database.

    The environment variable MLFLOW_TRACKING_URI takes precedence over `mlflow_uri` in runtime.yaml. If neither is set,
    the address is that of the SQLite database .onediff/mlflow.db. Raises ValueError for an unsupported address.
    """
    address = os.environ.get("MLFLOW_TRACKING_URI") or load_runtime().mlflow_uri
    if address is None:
        return f"sqlite:///{(HOME / 'mlflow.db').absolute()}"
    if not address.startswith((*SERVER, "sqlite:", "postgresql", "mysql", "mssql")):
        raise ValueError(f"MLflow address '{without_password(address)}': must be a server (http://, https://) or a "
                         "database (sqlite:///, postgresql://); correct MLFLOW_TRACKING_URI or runtime.mlflow_uri, or "
                         "unset both")
    return address


def exists() -> bool:
    """Return False if the MLflow store is a SQLite file that does not exist, and True otherwise.

    Call this before a read, because MLflow's client would create the missing file.
    """
    file = _sqlite_file(uri())
    return file is None or file.exists()


def _sqlite_file(address: str) -> Path | None:
    """Return the file of a SQLite database, or None if the address is that of a server or of another database."""
    return Path(address.removeprefix("sqlite:///").partition("?")[0]) if address.startswith("sqlite:///") else None


def where() -> str:
    """Return the address of the MLflow server or database without user and password, for messages."""
    return without_password(uri())


def check() -> None:
    """Check quickly that the configured MLflow server answers, or that the configured SQLite database can be read.

    Raises ValueError if not, or if the server rejects user and password. Other databases are not checked. This function
    does not import MLflow, because the import takes seconds.
    """
    address = uri()
    if not address.startswith(SERVER):
        _check_sqlite(address)
        return
    # This request fails if user or password is wrong; a request to MLflow's page /health would not.
    request = urllib.request.Request(
        f"{without_password(address).rstrip('/')}/api/2.0/mlflow/experiments/search?max_results=1",
        headers=_credentials(address))
    netrc = Path("~/.netrc").expanduser()
    other_credentials = any(os.environ.get(name) for name in _OTHER_CREDENTIALS) or netrc.exists()
    try:
        urllib.request.urlopen(request, timeout=5).close()
    except urllib.error.HTTPError as error:
        if error.code in _DENIED and not other_credentials:
            raise _denied(error.code) from None
        if error.code >= 500:
            raise _unreachable(address, f"the server answers with HTTP status {error.code}") from None
    except (OSError, ValueError) as error:
        raise _unreachable(address, str(getattr(error, "reason", error))) from None


def _check_sqlite(address: str) -> None:
    """Raise ValueError if the address is that of an existing file which is not a SQLite database or is damaged."""
    file = _sqlite_file(address)
    if file is None or not file.exists():
        return
    try:
        with closing(sqlite3.connect(file)) as database:
            database.execute("select count(*) from sqlite_master").fetchone()
    except sqlite3.DatabaseError as error:
        if "locked" not in str(error):  # MLflow waits for a database that another process has locked.
            raise _damaged(address, str(error)) from None


def _damaged(address: str, reason: str) -> ValueError:
    name = _sqlite_file(address) or without_password(address)
    return ValueError(f"MLflow's database {name} must be an undamaged SQLite database, but SQLite cannot read it "
                      f"({reason}): restore the file from a backup, or move it away, so that the next run creates an "
                      "empty one")


def _credentials(address: str) -> dict[str, str]:
    """Return the HTTP header with which MLflow's client logs in to a server, or {} if no user or token is configured.

    User and password come from the server's address, from environment variables or from ~/.mlflow/credentials.
    """
    if os.environ.get("MLFLOW_TRACKING_TOKEN"):
        return {"Authorization": f"Bearer {os.environ['MLFLOW_TRACKING_TOKEN']}"}
    file = configparser.RawConfigParser()
    file.read(Path("~/.mlflow/credentials").expanduser())
    parts = urllib.parse.urlsplit(address)
    pair = [urllib.parse.unquote(part or "") or os.environ.get(f"MLFLOW_TRACKING_{key}")
            or file.get("mlflow", f"mlflow_tracking_{key.lower()}", fallback="")
            for key, part in (("USERNAME", parts.username), ("PASSWORD", parts.password))]
    header = {"Authorization": f"Basic {base64.b64encode(':'.join(pair).encode()).decode()}"}
    return header if any(pair) else {}


def http_status(error: MlflowException | RequestException) -> int:
    """Return the HTTP status of a failed request to MLflow, or 503 if no server answered.

    Most requests raise MlflowException, but a failed download of a file raises an exception of the package `requests`.
    """
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        # If the download of a folder fails, the HTTP status is only in the message of the exception.
        in_message = re.search(r"\b(4\d\d) Client Error", str(error))
        return int(in_message[1] if in_message else error.get_http_status_code())
    return 503 if error.response is None else error.response.status_code


@contextmanager
def plain_errors() -> Iterator[None]:
    """Turn exceptions of MLflow in the `with` block or decorated function into exceptions with a one-line message.

    Raises ConnectionError if the HTTP status is 500 or above, because a later attempt may then succeed. For all other
    exceptions of MLflow, raises ValueError.
    """
    quiet()
    from mlflow.exceptions import MlflowException
    from requests import RequestException

    try:
        yield
    except (MlflowException, RequestException) as error:
        status = http_status(error)
        if status in _DENIED and uri().startswith(SERVER):
            raise _denied(status) from None
        if damage := _DAMAGE.search(str(error)):
            raise _damaged(uri(), damage[0]) from None
        kind = ConnectionError if status >= 500 else ValueError
        raise kind(f"MLflow at {where()}: {without_password(' '.join(str(error).split()))[:300]}") from None


def _denied(status: int) -> ValueError:
    if status == 401:
        return ValueError(f"MLflow at {where()} rejects the login (401): set MLFLOW_TRACKING_USERNAME and "
                          "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, to the values from the server's "
                          "administrator")
    user = os.environ.get("MLFLOW_TRACKING_USERNAME", "this user")
    return ValueError(f"MLflow at {where()} does not give {user} permission for this request (403): ask the server's "
                      "administrator for permission, or set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD of "
                      "a user with permission")


def _unreachable(address: str, reason: str) -> ValueError:
    return ValueError(f"MLflow at {without_password(address)} cannot be reached ({without_password(reason)}): start "
                      "the server or correct MLFLOW_TRACKING_URI, or unset MLFLOW_TRACKING_URI to record runs in "
                      ".onediff/mlflow.db")


def quiet() -> None:
    """Set environment variables that switch off MLflow's telemetry and progress bars, and shorten its timeouts.

    Call this function before MLflow is imported. Variables that are already set keep their values.
    """
    for key, value in _QUIET.items():
        os.environ.setdefault(key, value)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # Hides a warning for each repeated request.


def client() -> MlflowClient:
    """Return the MLflow client for the configured server or database. Each process creates only one for an address.

    Raises ValueError if the server or database does not answer.
    """
    return _client(uri())


@cache
def _client(address: str) -> MlflowClient:
    check()
    quiet()
    from mlflow import MlflowClient, set_tracking_uri
    from mlflow.exceptions import MlflowException

    # MLflow sets the level of this logger when it is imported, so our level is set after the import.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
    if address.startswith("sqlite:////"):
        Path(address.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    try:
        # MLflow creates another client for uploads of models, which would use ./mlflow.db without this call.
        set_tracking_uri(address)
        mlflow = MlflowClient(address, registry_uri=address)
        mlflow.search_experiments(max_results=1)  # The first request creates the tables in a new SQLite database.
    except MlflowException as error:
        if http_status(error) in _DENIED and address.startswith(SERVER):
            raise _denied(http_status(error)) from None
        raise _unreachable(address, first_line(error)) from None
    return mlflow


def lookup(request: Callable[..., Any], *arguments: str) -> Any:
    """Call the method `request` of MLflow's client; return its result, or None if MLflow has no such object."""
    from mlflow.exceptions import MlflowException

    try:
        return request(*arguments)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        return None


def all_pages(search: Callable[..., Any], *arguments: Any, **options: Any) -> Iterator[Any]:
    """Call a `search_...` method of MLflow's client for one page of results after another, and yield all results."""
    token = None
    while True:
        page = search(*arguments, **options, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def experiment_id() -> str:
    """Return the id of the MLflow experiment `onediff`, and create the experiment if it does not exist.

    With a SQLite database, files of runs are stored in a folder beside it. Raises ValueError if the experiment is
    deleted.
    """
    mlflow, address = client(), uri()
    from mlflow.exceptions import MlflowException

    experiment = mlflow.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        beside = Path(address.removeprefix("sqlite:///")).parent if address.startswith("sqlite:///") else HOME
        local = None if address.startswith(SERVER) else (beside / "mlflow-artifacts").absolute().as_uri()
        try:
            return mlflow.create_experiment(EXPERIMENT, artifact_location=local, tags=dict([KIND]))
        except MlflowException:  # Another process created the experiment after this process had looked for it.
            experiment = mlflow.get_experiment_by_name(EXPERIMENT)
    if experiment is None or experiment.lifecycle_stage != "active":
        raise ValueError(f"MLflow at {where()}: experiment '{EXPERIMENT}' must be active, but it is deleted; restore "
                         "it on MLflow's page")
    return str(experiment.experiment_id)


def mark_as_training(experiment: str) -> None:
    """Set the tag that makes MLflow's web page show the experiment as model training, unless this tag has a value."""
    mlflow = client()
    if KIND[0] not in mlflow.get_experiment(experiment).tags:
        mlflow.set_experiment_tag(experiment, *KIND)


def without_password(address: str) -> str:
    """Return a text after removing user and password from each address in it."""
    return re.sub(r"//[^/\s]*@", "//", address)


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or the name of its class if the message is empty."""
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
