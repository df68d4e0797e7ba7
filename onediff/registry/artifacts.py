"""The files of a version: model folder, scores of pairs, model card; on this machine, or fetched once from the server.

A version above runtime.register_by_reference_gb holds no weights but a reference.json: DVC fetches them by digest.
Each time that a model folder is handed out, all of its bytes are compared with the digest of the version.
"""

import hashlib
import json
import tempfile
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from onediff import paths, tracking
from onediff.model.digest import model_digests
from onediff.registry import store
from onediff.registry.audit_trail import check_champion
from onediff.registry.store import NAME, ModelVersion
from onediff.repro.lock import fetch

SCORED = "scored"  # folder of a version: the scores of each pair
REFERENCE = "reference.json"  # of a version without weights: their path, md5 (DVC's), weights_digest and remote
CACHE = tracking.HOME / "models"  # versions fetched from a server, weights fetched by digest
MODEL_DIGEST = "model_digest"  # tag: the identity of the model folder; versions of early code have weights_digest only
SCORES_DIGEST = "scores_digest"  # tag: the md5 of each file of scores and of the model that they belong to


@tracking.plain_errors()
def model_folder(uri: str = paths.CHAMPION) -> Path:
    """The model folder of models:/onediff@ALIAS or models:/onediff/VERSION, for `Captioner.load`.

    A version on a server is fetched once, into .onediff/models. Raises ValueError if there is no such version, if its
    files are missing or outside the store, if any byte of them is not what was registered, or if the champion never
    met the gate.
    """
    if uri == paths.CHAMPION:
        check_champion()
    version = store.resolve(uri)
    return _checked(_model_in(_fetched(version), version), version)


@tracking.plain_errors()
def version_files(uri: str = paths.CHAMPION) -> Path:
    """The folder that MLflow keeps for a version, with the model, the scores of its pairs and what was `carried`.

    Read it, change nothing. Raises as `model_folder`.
    """
    version = store.resolve(uri)
    folder, source = _fetched(version), location(version)
    if not _is_local(source):
        from mlflow.artifacts import list_artifacts

        with _missing_named(version):  # files beside the weights may have been replaced since they were fetched
            for item in list_artifacts(artifact_uri=source, tracking_uri=tracking.uri()):
                entry = item.path.rpartition("/")[2]
                if entry != _data_path(folder).split("/")[0]:
                    _download(f"{source}/{entry}", folder)
    return folder


@tracking.plain_errors()
def scored_pairs(uri: str, split: str = "test") -> dict[str, Any]:
    """benchmark -> the scores of each pair of the split, of models:/onediff@ALIAS or models:/onediff/VERSION.

    Raises ValueError if there is no such version or it was registered without them.
    """
    scores = pair_scores(store.resolve(uri), split)
    if not scores:
        raise ValueError(f"{uri} has no scores of single pairs: score it again: python -m flows.evaluate {uri}")
    return scores


@tracking.plain_errors()
def version_text(uri: str, name: str) -> str:
    """One text file of a version, such as lineage/lineage.json, without fetching the weights.

    Raises ValueError if there is no such version, FileNotFoundError if it has no such file.
    """
    return _text(f"{location(store.resolve(uri))}/{name}")


@tracking.plain_errors()
def version_tags(uri: str = paths.CHAMPION) -> dict[str, str]:
    """The tags of a version and its number. Raises ValueError if there is no such version."""
    version = store.resolve(uri)
    return {**version.tags, "version": str(version.version)}


def pair_scores(version: ModelVersion, split: str = "gate") -> dict[str, Any]:
    """Empty if the store has no scores of pairs for the version. Raises ValueError if they are not those registered."""
    source = f"{location(version)}/{SCORED}/{split}.json"
    try:
        text = _text(source)
    except FileNotFoundError:
        return {}
    got = hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()
    registered = json.loads(version.tags.get(SCORES_DIGEST, "{}")).get(f"{paths.SCORED}/{split}.json", got)
    if got != registered:
        raise ValueError(f"version {version.version}: {source} must have the registered md5 {registered}, got {got}: "
                         f"it was changed; score it again: python -m flows.evaluate models:/{NAME}/{version.version}")
    return json.loads(text)


def add_files(version: ModelVersion, source: Path, folder: str | None = None) -> None:
    """Copies a folder's content among the version's files; it replaces files of the same name."""
    location(version)
    tracking.client().log_model_artifacts(str(version.source).removeprefix("models:/"), str(source), folder)


def check_files(version: ModelVersion) -> None:
    """Raises ValueError unless the store has the version's files now, and its model is the one registered."""
    source = location(version)
    with tempfile.TemporaryDirectory() as scratch, _missing_named(version):
        # Not from the cache, which may be older than the files on the server.
        folder = _path(source) if _is_local(source) else _download(source, Path(scratch))
        _checked(_model_in(folder, version), version)


def location(version: ModelVersion) -> str:
    """Where MLflow keeps the version's files. Raises ValueError for a place outside the store, or if there are none."""
    mlflow = tracking.client()
    source = mlflow.get_model_version_download_uri(NAME, str(version.version))
    if source.startswith("models:/"):
        with _missing_named(version):
            source = mlflow.get_logged_model(source.removeprefix("models:/")).artifact_location
    root = mlflow.get_experiment(tracking.experiment_id()).artifact_location
    if not _inside(source, root):
        raise ValueError(f"version {version.version}: MLflow at {tracking.where()} says that its files are at "
                         f"'{source}', which is outside the store, '{root}': not read; register the model again")
    return source


def _inside(source: str, root: str) -> bool:
    while (plain := urllib.parse.unquote(source)) != source:
        source = plain
    if ".." in source.split("/") or "\x00" in source:
        return False
    if _is_local(root):
        return _is_local(source) and _path(source).resolve().is_relative_to(_path(root).resolve())
    return source.startswith(root.rstrip("/") + "/")


def _is_local(source: str) -> bool:
    return source.startswith(("file:", "/"))


def _path(source: str) -> Path:
    return Path(urllib.parse.unquote(urllib.parse.urlparse(source).path))


def _fetched(version: ModelVersion) -> Path:
    """The version's folder: in the store if that is on this machine, else a copy in the cache."""
    source = location(version)

    def download(scratch: Path) -> Path:
        folder = _download(source, scratch)
        if not (folder / REFERENCE).exists():
            _checked(folder / _data_path(folder), version)
        return folder

    with _missing_named(version):
        if _is_local(source):
            (_path(source) / "MLmodel").stat()
            return _path(source)
        return _cached(_identity(version), download)


def _cached(name: str, fill: Callable[[Path], Path]) -> Path:
    """The folder of this name in the cache. `fill`: fetches it into a scratch folder if the cache does not have it."""
    target = CACHE / name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            folder = fill(Path(scratch))
            try:
                folder.rename(target)
            except OSError:  # another process fetched it in the meantime
                if not target.is_dir():
                    raise
    return target


def _model_in(folder: Path, version: ModelVersion) -> Path:
    """The model folder of a version's folder; the weights that DVC keeps are fetched by digest once."""
    with _missing_named(version):
        reference = folder / REFERENCE
        if reference.exists():
            md5 = json.loads(reference.read_text(encoding="utf-8"))["md5"]
            return _cached(f"{_identity(version)}-weights",
                           lambda scratch: _checked(fetch(md5, scratch / "model"), version))
        model = folder / _data_path(folder)
        if not model.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"version {version.version}: its MLmodel names '{_data_path(folder)}', which is outside "
                             f"{folder}: not read; register the model again")
        model.stat()
        return model


def _identity(version: ModelVersion) -> str:
    return version.tags.get(MODEL_DIGEST) or version.tags["weights_digest"]


def cached_names(tags: Mapping[str, str]) -> set[str]:
    """The names under which `CACHE` keeps a version with these tags."""
    digests = [tags[key] for key in (MODEL_DIGEST, "weights_digest") if key in tags]
    return {*digests, *(f"{digest}-weights" for digest in digests)}


def _checked(model: Path, version: ModelVersion) -> Path:
    """Returns the model folder. Raises ValueError if its digest is not the registered one. Old versions have a digest
    of their weights only, so only the weights are compared.
    """
    with _missing_named(version):
        digests = model_digests(model)
    what, got, registered = "files", digests.folder, version.tags.get(MODEL_DIGEST)
    if registered is None:
        what, got, registered = "weights", digests.weights, version.tags.get("weights_digest", "none")
    if got != registered:
        copies = [copy for name in cached_names(version.tags) if model.is_relative_to(copy := CACHE / name)]
        cure = f"remove {copies[0]}, and it is fetched again" if copies else "register the model again"
        raise ValueError(f"version {version.version}: the {what} in {model} must have the registered digest "
                         f"{registered[:12]}, got {got[:12]}: they were changed; {cure}")
    return model


def _data_path(folder: Path) -> str:
    return str(YAML(typ="safe").load(folder / "MLmodel")["flavors"]["python_function"]["data"])


def _download(source: str, target: Path) -> Path:
    from mlflow.artifacts import download_artifacts

    return Path(download_artifacts(artifact_uri=source, dst_path=str(target), tracking_uri=tracking.uri()))


def _text(source: str) -> str:
    """The content of a text file of a version. Raises FileNotFoundError if there is no such file."""
    with tempfile.TemporaryDirectory() as scratch, _missing_as(FileNotFoundError, f"{source} not found"):
        return _download(source, Path(scratch)).read_text(encoding="utf-8")


def _missing_named(version: ModelVersion) -> AbstractContextManager[None]:
    """Raises ValueError, naming the version, in place of an error for a missing file."""
    return _missing_as(ValueError, f"version {version.version}: its files are not where MLflow at {tracking.where()} "
                       "says", "; bring them back, or train and register it again")


@contextmanager
def _missing_as(kind: type[Exception], message: str, cure: str = "") -> Iterator[None]:
    """Raises the exception in place of an error for a missing file. Other failures of a server are raised unchanged."""
    from mlflow.exceptions import MlflowException
    from requests import RequestException

    try:
        yield
    except (MlflowException, OSError) as error:
        of_request = isinstance(error, (MlflowException, RequestException))
        if tracking.http_status(error) != 404 if of_request else isinstance(error, ConnectionError):
            raise
        raise kind(f"{message} ({' '.join(str(error).split())[:200]}){cure}") from None
