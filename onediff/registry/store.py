"""What MLflow holds under the names `onediff` and `onediff-audit`, and its failures as one line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from onediff import tracking

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

NAME = "onediff"
AUDIT = "onediff-audit"  # its versions are the records of the trail
CANDIDATE, CHAMPION, PREVIOUS = "candidate", "champion", "previous"
CHAMPION_URI = f"models:/{NAME}@{CHAMPION}"
EMPTY = "'make run' trains and registers one"

Aliases = dict[str, str]  # alias -> version


@contextmanager
def plain_errors() -> Iterator[None]:
    """MLflow's failures as one line: ConnectionError if its server may answer the next time, else ValueError."""
    tracking.quiet()
    from mlflow.exceptions import MlflowException
    from requests import RequestException

    try:
        yield
    except (MlflowException, RequestException) as error:
        raise tracking.plain(error) from None


def all_of(name: str) -> list[ModelVersion]:
    """All versions of a registered model, oldest first; none if there is no such model."""
    found: list[ModelVersion] = []
    token = None
    while True:
        page = tracking.client().search_model_versions(f"name = '{name}'", max_results=1000, page_token=token)
        found += page
        token = page.token
        if not token:
            return sorted(found, key=lambda item: int(item.version))


def make_model(name: str, description: str) -> None:
    """Makes the registered model unless it is there."""
    store = tracking.client()
    from mlflow.exceptions import MlflowException

    try:
        store.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        try:
            store.create_registered_model(name, description=description)
        except MlflowException as made:  # by another process since we looked
            if made.error_code != "RESOURCE_ALREADY_EXISTS":
                raise


def aliases() -> Aliases:
    """What MLflow says now. Raises ValueError if nothing is registered."""
    store = tracking.client()
    from mlflow.exceptions import MlflowException

    try:
        found = store.get_registered_model(NAME).aliases
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise ValueError(f"no version of '{NAME}' at {tracking.where()}: {EMPTY}") from None
    return {alias: str(version) for alias, version in found.items()}


def get(version: str) -> ModelVersion:
    """Raises ValueError if it is not registered."""
    store = tracking.client()
    from mlflow.exceptions import MlflowException

    try:
        return store.get_model_version(NAME, version)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        known = ", ".join(str(item.version) for item in all_of(NAME)) or "none"
        raise ValueError(f"version {version} of '{NAME}' is not registered; there are: {known}") from None


def need(named: Mapping[str, str], alias: str, cure: str) -> str:
    """The version of an alias. Raises ValueError with the cure if it has none."""
    if alias not in named:
        raise ValueError(f"no version of '{NAME}' is {alias}: {cure}")
    return named[alias]


def resolve(uri: str) -> ModelVersion:
    """The version of models:/onediff@ALIAS or models:/onediff/VERSION. Raises ValueError if there is none."""
    name, _, version = uri.removeprefix("models:/").partition("/")
    name, _, alias = name.partition("@")
    if not uri.startswith("models:/") or name != NAME or bool(alias) == bool(version):
        raise ValueError(f"'{uri}' names no version: write models:/{NAME}@{CHAMPION} or models:/{NAME}/1")
    return get(version or need(aliases(), alias, "'onediff registry list' shows what there is"))


def tag(name: str, version: str, tags: Mapping[str, str]) -> None:
    for key, value in tags.items():
        tracking.client().set_model_version_tag(name, version, key, value)


def when(milliseconds: int) -> str:
    """MLflow's clock as ISO 8601 in UTC, to the second."""
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="seconds")


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
