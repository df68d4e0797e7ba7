"""The files of a version: model folder, scores of pairs, model card; on this machine, or fetched once from the server.

A version above runtime.register_by_reference_gb holds no weights but a reference.json: DVC fetches them by digest.
Each time that a model folder is handed out, all of its bytes are compared with the digest of the version.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import urllib.parse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ruamel.yaml import YAML

from onediff import tracking
from onediff.model.digest import model_digests
from onediff.registry import store
from onediff.registry.store import CHAMPION_URI, NAME
from onediff.registry.trail import check_champion

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

SCORED = "scored"  # folder of a version: what each pair scored
REFERENCE = "reference.json"  # of a version without weights: their path, md5 (DVC's), weights_digest and remote
CACHE = tracking.HOME / "models"  # versions fetched from a server, weights fetched by digest
MODEL_DIGEST = "model_digest"  # tag: the identity of the model folder; versions of early code have weights_digest alone
SCORES_DIGEST = "scores_digest"  # tag: the md5 of each file of scores and of the model that they belong to


@store.plain_errors()
def model_folder(uri: str = CHAMPION_URI) -> Path:
    """The model folder of models:/onediff@ALIAS or models:/onediff/VERSION, for `Captioner.load`.

    A version on a server is fetched once, into .onediff/models. Raises ValueError if there is no such version, if its
    files are gone or outside the store, if any byte of them is not what was registered, or if the champion never met
    the gate.
    """
    if uri == CHAMPION_URI:
        check_champion()
    version = store.resolve(uri)
    folder = _fetched(version)
    return _checked(_model_in(folder, version), version, cure=_cure(folder))


@store.plain_errors()
def version_files(uri: str = CHAMPION_URI) -> Path:
    """The whole folder that MLflow keeps for a version: beside the model its scores of pairs and what was `carried`.

    Read it, change nothing. Raises as `model_folder`.
    """
    version = store.resolve(uri)
    folder = _fetched(version)
    if _is_here(location(version)):
        return folder
    with _gone(version):  # what stands beside the weights may have been written anew since they were fetched
        for entry in _listed(location(version)):
            if entry != _data_path(folder).split("/")[0]:
                _download(f"{location(version)}/{entry}", folder)
    return folder


@store.plain_errors()
def scored_pairs(uri: str, split: str = "test") -> dict[str, Any]:
    """benchmark -> what each pair of the split scored with models:/onediff@ALIAS or models:/onediff/VERSION.

    Raises ValueError if there is no such version or it was registered without.
    """
    found = pair_scores(store.resolve(uri), split)
    if not found:
        raise ValueError(f"{uri} has no scores of single pairs: score it again: python -m flows.evaluate {uri}")
    return found


@store.plain_errors()
def version_text(uri: str, name: str) -> str:
    """One text file that a version carries, such as lineage/lineage.json; its weights are not fetched for it.

    Raises ValueError if there is no such version, FileNotFoundError if it carries no such file.
    """
    return _text(f"{location(store.resolve(uri))}/{name}")


@store.plain_errors()
def pinned(uri: str) -> str:
    """The version that models:/onediff@ALIAS or models:/onediff/VERSION means now, as models:/onediff/VERSION.

    Raises ValueError if there is no such version.
    """
    return f"models:/{NAME}/{store.resolve(uri).version}"


@store.plain_errors()
def version_tags(uri: str = CHAMPION_URI) -> dict[str, str]:
    """What is noted of a version, its number too. Raises ValueError if there is no such version."""
    found = store.resolve(uri)
    return {**found.tags, "version": str(found.version)}


def pair_scores(version: ModelVersion, split: str = "gate") -> dict[str, Any]:
    """Empty if the store has no scores of pairs for the version. Raises ValueError if they are not those registered."""
    source = f"{location(version)}/{SCORED}/{split}.json"
    try:
        text = _text(source)
    except FileNotFoundError:
        return {}
    got = hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()
    wanted = json.loads(version.tags.get(SCORES_DIGEST, "{}")).get(f"data/{SCORED}/{split}.json", got)
    if got != wanted:
        raise ValueError(f"version {version.version}: {source} must have the registered md5 {wanted}, got {got}: "
                         f"it was changed; score it again: python -m flows.evaluate models:/{NAME}/{version.version}")
    return json.loads(text)


def keep(version: ModelVersion, source: Path, folder: str | None = None) -> None:
    """Copies a folder's content among the version's files; it replaces what has the same name."""
    location(version)
    tracking.client().log_model_artifacts(str(version.source).removeprefix("models:/"), str(source), folder)


def check_whole(version: ModelVersion) -> None:
    """Raises ValueError unless the store has the version's files now, and its model is the one registered."""
    source = location(version)
    if _is_here(source):
        _checked(_model_in(_fetched(version), version), version)
        return
    with tempfile.TemporaryDirectory() as scratch, _gone(version):  # an older copy says nothing of what the server has
        folder = _download(source, Path(scratch))
        _checked(_model_in(folder, version), version)


def location(version: ModelVersion) -> str:
    """Where MLflow keeps the version's files. Raises ValueError for a place outside the store or none at all."""
    opened = tracking.client()
    from mlflow.exceptions import MlflowException

    source = opened.get_model_version_download_uri(NAME, str(version.version))
    try:
        if source.startswith("models:/"):
            source = opened.get_logged_model(source.removeprefix("models:/")).artifact_location
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise _lost(version, error) from None
    root = opened.get_experiment(tracking.experiment_id()).artifact_location
    if not _inside(source, root):
        raise ValueError(f"version {version.version}: MLflow at {tracking.where()} says that its files are at "
                         f"'{source}', which is outside the store, '{root}': not read; register the model again")
    return source


def _inside(source: str, root: str) -> bool:
    while (plain := urllib.parse.unquote(source)) != source:
        source = plain
    if ".." in source.split("/") or "\x00" in source:
        return False
    if _is_here(root):
        return _is_here(source) and _path(source).resolve().is_relative_to(_path(root).resolve())
    return source.startswith(root.rstrip("/") + "/")


def _is_here(source: str) -> bool:
    return source.startswith(("file:", "/"))


def _path(source: str) -> Path:
    return Path(urllib.parse.unquote(urllib.parse.urlparse(source).path))


def _fetched(version: ModelVersion) -> Path:
    """The version's folder: where it is if it is on this machine, else a copy in the cache."""
    source = location(version)
    with _gone(version):
        if _is_here(source):
            (_path(source) / "MLmodel").stat()
            return _path(source)
        target = CACHE / _identity(version)
        if (target / "MLmodel").exists():
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            got = _download(source, Path(scratch))
            if not (got / REFERENCE).exists():
                _checked(got / _data_path(got), version)
            _settle(got, target)
    return target


def _settle(got: Path, target: Path) -> None:
    try:
        got.rename(target)
    except OSError:  # another process fetched it meanwhile
        if not target.is_dir():
            raise


def _model_in(folder: Path, version: ModelVersion) -> Path:
    with _gone(version):
        reference = folder / REFERENCE
        if reference.exists():
            return _by_reference(json.loads(reference.read_text(encoding="utf-8")), version)
        inner = folder / _data_path(folder)
        if not inner.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"version {version.version}: its MLmodel names '{_data_path(folder)}', which is outside "
                             f"{folder}: not read; register the model again")
        inner.stat()
        return inner


def _by_reference(reference: dict[str, str], version: ModelVersion) -> Path:
    """The weights that DVC keeps, fetched by digest once. Raises ValueError if they are not those registered."""
    from onediff.repro.lock import fetch

    target = CACHE / f"{_identity(version)}-weights"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            got = fetch(reference["md5"], Path(scratch) / "model")
            _checked(got, version)
            _settle(got, target)
    return target


def _identity(version: ModelVersion) -> str:
    return version.tags.get(MODEL_DIGEST) or version.tags["weights_digest"]


def copies_of(tags: Mapping[str, str]) -> set[str]:
    """The names under which `CACHE` keeps a version with these tags."""
    digests = [tags[key] for key in (MODEL_DIGEST, "weights_digest") if key in tags]
    return {*digests, *(f"{digest}-weights" for digest in digests)}


def _checked(folder: Path, version: ModelVersion, *, cure: str = "register the model again") -> Path:
    """Gives the folder back. Raises ValueError if its digest is not the registered one. Old versions have a digest of
    their weights alone, so only the weights are compared.
    """
    with _gone(version):
        digests = model_digests(folder)
    what, got, wanted = "files", digests.folder, version.tags.get(MODEL_DIGEST)
    if wanted is None:
        what, got, wanted = "weights", digests.weights, version.tags.get("weights_digest", "none")
    if got != wanted:
        raise ValueError(f"version {version.version}: the {what} in {folder} must have the registered digest "
                         f"{wanted[:12]}, got {got[:12]}: they were changed; {cure}")
    return folder


def _cure(folder: Path) -> str:
    if (folder / REFERENCE).exists():
        return f"remove its folder in {CACHE}, and DVC fetches it again"
    return f"remove {folder}, and it is fetched again" if folder.is_relative_to(CACHE) else "register the model again"


def _data_path(folder: Path) -> str:
    described = YAML(typ="safe").load((folder / "MLmodel").read_text(encoding="utf-8"))
    return str(described["flavors"]["python_function"]["data"])


def _download(source: str, target: Path) -> Path:
    from mlflow.artifacts import download_artifacts

    return Path(download_artifacts(artifact_uri=source, dst_path=str(target), tracking_uri=tracking.uri()))


def _text(source: str) -> str:
    """Raises FileNotFoundError if there is no such file."""
    from mlflow.exceptions import MlflowException

    with tempfile.TemporaryDirectory() as scratch:
        try:
            return _download(source, Path(scratch)).read_text(encoding="utf-8")
        except (MlflowException, OSError) as error:
            if _may_be_there(error):
                raise
            raise FileNotFoundError(f"{source} not found ({' '.join(str(error).split())[:200]})") from None


def _may_be_there(error: Exception) -> bool:
    """Whether a server said anything but that there is no such file."""
    from mlflow.exceptions import MlflowException
    from requests import RequestException

    if isinstance(error, (MlflowException, RequestException)):
        return tracking.http_status(error) != 404
    return isinstance(error, ConnectionError)


def _listed(source: str) -> list[str]:
    """Names of what is directly in the folder."""
    from mlflow.artifacts import list_artifacts

    return [item.path.rpartition("/")[2] for item in list_artifacts(artifact_uri=source, tracking_uri=tracking.uri())]


@contextmanager
def _gone(version: ModelVersion) -> Iterator[None]:
    """A file that is not there, as one line."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError) as error:
        if _may_be_there(error):
            raise
        raise _lost(version, error) from None


def _lost(version: ModelVersion, error: Exception) -> ValueError:
    return ValueError(f"version {version.version}: its files are not where MLflow at {tracking.where()} says "
                      f"({' '.join(str(error).split())[:200]}); bring them back, or train and register it again")
