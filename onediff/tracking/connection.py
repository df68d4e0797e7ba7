"""The connection to MLflow: its address, its client, and its failures as one line.

Only onediff/tracking and onediff/registry import MLflow, and only inside functions: importing it takes seconds.
"""

from __future__ import annotations

import base64
import configparser
import logging
import os
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onediff.config import load_runtime

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from requests import RequestException

EXPERIMENT = "onediff"
HOME = Path(".onediff")
SERVER = ("http://", "https://")
_DENIED = (401, 403)
_OTHER_CREDENTIALS = ("MLFLOW_TRACKING_AUTH", "MLFLOW_TRACKING_AWS_SIGV4", "MLFLOW_TRACKING_CLIENT_CERT_PATH")
_QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true", "MLFLOW_LOGGING_LEVEL": "WARNING",
          "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true", "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
          "MLFLOW_HTTP_REQUEST_TIMEOUT": "20", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2"}


def uri() -> str:
    """The address of the store: MLFLOW_TRACKING_URI, else runtime.mlflow_uri, else SQLite in .onediff.

    Raises ValueError for an address that MLflow cannot keep runs at.
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
    """Return False if the store is a SQLite file that does not exist. Opening such a store would create the file."""
    address = uri()
    return not address.startswith("sqlite:///") or Path(address.removeprefix("sqlite:///").partition("?")[0]).exists()


def where() -> str:
    """`uri()` as it may be shown: without user and password."""
    return without_password(uri())


def check() -> None:
    """Raises ValueError within seconds if a server is set and does not answer or refuses us. Imports no MLflow."""
    address = uri()
    if not address.startswith(SERVER):
        return
    request = urllib.request.Request(  # not /health, which needs no credentials
        f"{without_password(address).rstrip('/')}/api/2.0/mlflow/experiments/search?max_results=1",
        headers=_credentials(address))
    others = any(os.environ.get(name) for name in _OTHER_CREDENTIALS) or Path("~/.netrc").expanduser().exists()
    try:
        urllib.request.urlopen(request, timeout=5).close()
    except urllib.error.HTTPError as error:
        if error.code in _DENIED and not others:
            raise _denied(error.code) from None
        if error.code >= 500:
            raise _unreachable(address, f"it answers {error.code}") from None
    except (OSError, ValueError) as error:
        raise _unreachable(address, str(getattr(error, "reason", error))) from None


def _credentials(address: str) -> dict[str, str]:
    """The header with which MLflow's client logs in, from the address, the environment or ~/.mlflow/credentials."""
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
    """The HTTP status of a failure; 503 if no server answered. Downloads of files fail with errors of `requests`."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        in_message = re.search(r"\b(4\d\d) Client Error", str(error))  # all that a failed download of a folder has
        return int(in_message[1] if in_message else error.get_http_status_code())
    return 503 if error.response is None else error.response.status_code


@contextmanager
def plain_errors() -> Iterator[None]:
    """Raises MLflow's failures as one line: ConnectionError if its server may answer the next time, else ValueError."""
    quiet()
    from mlflow.exceptions import MlflowException
    from requests import RequestException

    try:
        yield
    except (MlflowException, RequestException) as error:
        status = http_status(error)
        if status in _DENIED and uri().startswith(SERVER):
            raise _denied(status) from None
        kind = ConnectionError if status >= 500 else ValueError
        raise kind(f"MLflow at {where()}: {without_password(' '.join(str(error).split()))[:300]}") from None


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
    """Sets MLflow up for this process before its first import: no telemetry, short waits. Does not replace settings."""
    for key, value in _QUIET.items():
        os.environ.setdefault(key, value)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # or every retry of a lost server is a line


def client() -> MlflowClient:
    """The client of this process for `uri()`, made once. Raises ValueError if the store does not answer."""
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
        mlflow = MlflowClient(address, registry_uri=address)
        mlflow.search_experiments(max_results=1)  # SQLite makes its tables here, once per process and store
    except MlflowException as error:
        if http_status(error) in _DENIED and address.startswith(SERVER):
            raise _denied(http_status(error)) from None
        raise _unreachable(address, first_line(error)) from None
    return mlflow


def lookup(request: Callable[..., Any], *arguments: str) -> Any:
    """The answer to a request of the client, or None if MLflow has nothing of this name."""
    from mlflow.exceptions import MlflowException

    try:
        return request(*arguments)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        return None


def all_pages(search: Callable[..., Any], *arguments: Any, **options: Any) -> Iterator[Any]:
    """Everything that a `search_...` method of the client gives, page after page."""
    token = None
    while True:
        page = search(*arguments, **options, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def experiment_id() -> str:
    """The id of the experiment `onediff`, made if missing. Local stores keep artifacts beside the database."""
    mlflow, address = client(), uri()
    from mlflow.exceptions import MlflowException

    experiment = mlflow.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        beside = Path(address.removeprefix("sqlite:///")).parent if address.startswith("sqlite:///") else HOME
        local = None if address.startswith(SERVER) else (beside / "mlflow-artifacts").absolute().as_uri()
        try:
            return mlflow.create_experiment(EXPERIMENT, artifact_location=local)
        except MlflowException:  # another process made it in the meantime
            experiment = mlflow.get_experiment_by_name(EXPERIMENT)
    if experiment is None or experiment.lifecycle_stage != "active":
        raise ValueError(f"MLflow at {where()}: experiment '{EXPERIMENT}' is deleted; restore it in the MLflow page")
    return str(experiment.experiment_id)


def without_password(address: str) -> str:
    return re.sub(r"//[^/\s]*@", "//", address)


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
