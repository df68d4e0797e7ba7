"""MLflow's registered models `onediff` and `onediff-audit`, and the lock under which their aliases change.

MLflow has no compare-and-set. Therefore one process at a time changes the aliases of a database on this machine, and
only the deployments promote and rollback change those of a store that several machines share.
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
AUDIT = "onediff-audit"  # its versions are the records of the trail
CANDIDATE, CHAMPION, PREVIOUS = "candidate", "champion", "previous"
WAIT_S = 600.0

Aliases = dict[str, str]  # alias -> version
ModelVersion = Any  # that of mlflow.entities.model_registry; importing MLflow takes seconds

_sole_writer: ContextVar[bool] = ContextVar("sole_writer", default=False)


def versions_of(model: str) -> list[ModelVersion]:
    """All versions of a registered model, oldest first; none if there is no such model."""
    if not tracking.exists():
        return []
    pages = tracking.all_pages(tracking.client().search_model_versions, f"name = '{model}'", max_results=1000)
    return sorted(pages, key=lambda item: int(item.version))


def make_model(name: str, description: str) -> None:
    """Creates the registered model if it does not exist."""
    mlflow = tracking.client()
    from mlflow.exceptions import MlflowException

    if tracking.lookup(mlflow.get_registered_model, name):
        return
    try:
        mlflow.create_registered_model(name, description=description)
    except MlflowException as error:  # another process created it in the meantime
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def aliases() -> Aliases:
    """The aliases in MLflow now. Raises ValueError if nothing is registered."""
    model = tracking.lookup(tracking.client().get_registered_model, NAME) if tracking.exists() else None
    if model is None:
        raise ValueError(f"no version of '{NAME}' at {tracking.where()}: 'make run' trains and registers one")
    return {alias: str(version) for alias, version in model.aliases.items()}


def get(version: str) -> ModelVersion:
    """A version of `onediff`. Raises ValueError if it is not registered."""
    item = tracking.lookup(tracking.client().get_model_version, NAME, version) if tracking.exists() else None
    if item is None:
        known = ", ".join(str(other.version) for other in versions_of(NAME)) or "none"
        raise ValueError(f"version {version} of '{NAME}' is not registered; there are: {known}")
    return item


def version_of(alias: str, named: Mapping[str, str], cure: str) -> str:
    """The version that an alias names. Raises ValueError with the cure if it names none."""
    if alias not in named:
        raise ValueError(f"no version of '{NAME}' is {alias}: {cure}")
    return named[alias]


def resolve(uri: str) -> ModelVersion:
    """The version of models:/onediff@ALIAS or models:/onediff/VERSION. Raises ValueError if there is none."""
    name, _, version = uri.removeprefix("models:/").partition("/")
    name, _, alias = name.partition("@")
    if not uri.startswith("models:/") or name != NAME or bool(alias) == bool(version):
        raise ValueError(f"'{uri}' names no version: write {paths.CHAMPION} or models:/{NAME}/1")
    return get(version or version_of(alias, aliases(), "'onediff registry list' shows what there is"))


def set_tags(model: str, version: str, tags: Mapping[str, str]) -> None:
    """Sets tags of a version, in this order."""
    for key, value in tags.items():
        tracking.client().set_model_version_tag(model, version, key, value)


def iso_time(milliseconds: int) -> str:
    """A time of MLflow as ISO 8601 in UTC, to the second."""
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="seconds")


# --- one writer at a time --------------------------------------------------------------------------------------------


def shared() -> bool:
    """Whether other machines can reach the registry: a server or a database other than SQLite."""
    return not tracking.uri().startswith("sqlite:")


@contextmanager
def sole_writer() -> Iterator[None]:
    """Declares that no other process changes a shared registry inside this block. The deployments promote and rollback,
    which run one at a time, use it. If the declaration is wrong, the later of two changes is refused.
    """
    token = _sole_writer.set(True)
    try:
        yield
    finally:
        _sole_writer.reset(token)


def may_write() -> bool:
    """Whether this process may change the aliases."""
    return _sole_writer.get() or not shared()


@contextmanager
def writing() -> Iterator[None]:
    """Surrounds every change; does not nest. Raises ValueError on a shared registry unless `sole_writer` is held."""
    if not may_write():
        raise ValueError(f"aliases at {tracking.where()} are changed by the deployments promote and rollback alone: "
                         "'onediff registry promote' submits to them")
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
                    raise ValueError(f"{path}: another process has been changing the registry for {WAIT_S:.0f} s; "
                                     "see what it does, or end it") from None
                time.sleep(0.05)
        yield  # closing the file, or the end of the process, releases the lock


def user_and_machine() -> str:
    """user@machine, for the trail."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        user = "unknown"
    return f"{user}@{socket.gethostname()}"
