"""Lookups in MLflow's registered models `onediff` and `onediff-audit`, and the lock for changes of their aliases.

Two processes must not change the aliases at once, because MLflow cannot make a change depend on the old value of an
alias. Therefore, in a database on this machine, one process at a time changes the aliases. In a store that several
machines share, only the Prefect deployments `promote` and `rollback` change them.
"""

import fcntl
import getpass
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from onediff import paths, tracking

NAME = "onediff"
AUDIT = "onediff-audit"  # Each version of this registered model is one record of the audit trail.
CANDIDATE, CHAMPION, PREVIOUS = "candidate", "champion", "previous"
WAIT_S = 600.0

Aliases = dict[str, str]  # Maps each alias to the number of a version.
ModelVersion = Any  # MLflow's class ModelVersion, which is not imported here because importing MLflow takes seconds

_sole_writer: ContextVar[bool] = ContextVar("sole_writer", default=False)


def versions_of(model: str) -> list[ModelVersion]:
    """Return all versions of the registered model `model`, oldest first, or [] if the model does not exist."""
    if not tracking.exists():
        return []
    pages = tracking.all_pages(tracking.client().search_model_versions, f"name = '{model}'", max_results=1000)
    return sorted(pages, key=lambda item: int(item.version))


def make_model(name: str, description: str) -> None:
    """Create an entry for a model with this name and description in MLflow's registry, if it does not exist."""
    mlflow = tracking.client()
    from mlflow.exceptions import MlflowException

    if tracking.lookup(mlflow.get_registered_model, name):
        return
    try:
        mlflow.create_registered_model(name, description=description)
    except MlflowException as error:  # Another process may have created the registered model after the lookup above.
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def aliases() -> Aliases:
    """Return a dict from each MLflow alias to the number of its version. Raises ValueError if there are no versions."""
    model = tracking.lookup(tracking.client().get_registered_model, NAME) if tracking.exists() else None
    if model is None:
        raise ValueError(f"MLflow at {tracking.where()} must have a version of '{NAME}', but has none: 'make run' "
                         "trains and registers one")
    return {alias: str(version) for alias, version in model.aliases.items()}


def get(version: str) -> ModelVersion:
    """Return the version with this number of the registered model `onediff`. Raises ValueError if there is none."""
    item = tracking.lookup(tracking.client().get_model_version, NAME, version) if tracking.exists() else None
    if item is None:
        known = ", ".join(str(other.version) for other in versions_of(NAME)) or "none"
        raise ValueError(f"version {version} of '{NAME}' is not registered; registered versions: {known}")
    return item


def version_of(alias: str, named: Mapping[str, str], cure: str) -> str:
    """Return the number of the version that has this alias in `named`, a dict from aliases to version numbers.

    Raises ValueError if no version has the alias. The message ends with `cure`, which says how to correct this.
    """
    if alias not in named:
        raise ValueError(f"no version of '{NAME}' has the alias {alias}: {cure}")
    return named[alias]


def resolve(uri: str) -> ModelVersion:
    """Return the registered version with the address models:/onediff@ALIAS or models:/onediff/VERSION.

    Raises ValueError if the address has another form, or if the version does not exist.
    """
    name, _, version = uri.removeprefix("models:/").partition("/")
    name, _, alias = name.partition("@")
    if not uri.startswith("models:/") or name != NAME or bool(alias) == bool(version):
        raise ValueError(f"the address of a version must look like {paths.CHAMPION} or models:/{NAME}/1, got '{uri}'")
    return get(version or version_of(alias, aliases(), "'onediff registry list' shows all versions and aliases"))


def set_tags(model: str, version: str, tags: Mapping[str, str]) -> None:
    """Set MLflow tags of a version of the registered model `model`, in the order of the dict `tags`."""
    for key, value in tags.items():
        tracking.client().set_model_version_tag(model, version, key, value)


def iso_time(milliseconds: int) -> str:
    """Convert a time in milliseconds since 1970, as MLflow stores it, to an ISO 8601 text in UTC with full seconds."""
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="seconds")


def shared() -> bool:
    """Return True if other machines can use the model registry: MLflow is a server, or its database is not SQLite."""
    return not tracking.uri().startswith("sqlite:")


@contextmanager
def sole_writer() -> Iterator[None]:
    """Allow this process to change the aliases in a shared model registry during the `with` block.

    Only the Prefect deployments `promote` and `rollback`, which run one at a time, may use it. If another process
    changes the aliases during the block, the later of the two changes fails with an error.
    """
    token = _sole_writer.set(True)
    try:
        yield
    finally:
        _sole_writer.reset(token)


def may_write() -> bool:
    """Return True if this process may change the aliases: the registry is not shared, or `sole_writer` is used."""
    return _sole_writer.get() or not shared()


@contextmanager
def writing() -> Iterator[None]:
    """Hold the lock for changes of the aliases during the `with` block. Such blocks must not be nested.

    Raises ValueError if several machines share the model registry and `sole_writer` is not used, or if another process
    holds the lock for more than WAIT_S seconds. In a shared registry, no lock file is used.
    """
    if not may_write():
        raise ValueError(f"aliases at {tracking.where()} must be changed by the Prefect deployments promote and "
                         "rollback only: run 'onediff registry promote' or 'onediff registry rollback', which start "
                         "a run of these deployments")
    if shared():
        yield
        return
    path = Path(tracking.uri().removeprefix("sqlite:///") + ".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + WAIT_S
    with path.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ValueError(f"{path}: another process has held this lock of the registry for {WAIT_S:.0f} s; "
                                     "wait until that process ends, or end it") from None
                time.sleep(0.05)
        yield  # Closing the lock file releases the lock; so does the end of the process.


def user_and_machine() -> str:
    """Return USER@MACHINE of this process, which the audit trail records as the author of a change."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # In a container, the id of the user may have no user name.
        user = "unknown"
    return f"{user}@{socket.gethostname()}"
