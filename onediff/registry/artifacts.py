"""The files of a registered version: model folder, scores, lineage and model card.

The files are read from this machine, or downloaded once from the MLflow server. A model larger than the setting
`register_by_reference_gb` is not copied into MLflow: its version contains a reference.json, and DVC downloads the
weights by their digest. Each time that `model_folder` returns a folder, it compares all bytes with the registered
digest.
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
from onediff.registry.evidence import TABLES
from onediff.registry.store import NAME, ModelVersion
from onediff.repro.lock import fetch

# SCORED is the folder in a registered model version with test.json and gate.json, the scores of each image pair.
SCORED = "scored"
# SCORES is the folder in a registered model version with the score tables: metrics.json (test split) and gate.json.
SCORES = "scores"
# This file replaces large weights in a registered model version: it has their path, digests and DVC remote.
REFERENCE = "reference.json"
# CACHE is the folder for model versions downloaded from an MLflow server, and for weights downloaded by DVC.
CACHE = tracking.HOME / "models"
# This MLflow tag contains the digest of all files of the model folder. Old versions only have weights_digest.
MODEL_DIGEST = "model_digest"
# This MLflow tag contains the md5 of each score file and the md5 of the model folder that was scored.
SCORES_DIGEST = "scores_digest"


@tracking.plain_errors()
def model_folder(uri: str = paths.CHAMPION) -> Path:
    """Return the local model folder of a registered version, from which `Captioner.load` can load the model.

    `uri` is models:/onediff@ALIAS or models:/onediff/VERSION. Files on an MLflow server are downloaded once, into
    .onediff/models. Raises ValueError if the version does not exist, if its files are missing, changed or outside the
    MLflow store, or if `uri` is the champion and the champion never passed the promotion rules.
    """
    if uri == paths.CHAMPION:
        check_champion()
    version = store.resolve(uri)
    return _checked(_model_in(_fetched(version), version), version)


@tracking.plain_errors()
def version_files(uri: str = paths.CHAMPION) -> Path:
    """Return a local folder with all files of a registered version: model, scores, lineage, card and drift profile.

    The caller must not change the files. Raises ValueError if the version does not exist, if its files are
    missing, or if a downloaded model differs from the registered digest.
    """
    version = store.resolve(uri)
    folder, source = _fetched(version), location(version)
    if not _is_local(source):
        from mlflow.artifacts import list_artifacts

        # The cached model never changes, but `rescore` may have replaced the other files on the server.
        with _missing_named(version):
            for item in list_artifacts(artifact_uri=source, tracking_uri=tracking.uri()):
                entry = item.path.rpartition("/")[2]
                if entry != _data_path(folder).split("/")[0]:
                    _download(f"{source}/{entry}", folder)
    return folder


@tracking.plain_errors()
def scored_pairs(uri: str, split: str = "test") -> dict[str, Any]:
    """Return the scores of each image pair in a split, by benchmark, of a registered version.

    `uri` is models:/onediff@ALIAS or models:/onediff/VERSION. Raises ValueError if the version does not exist, or if
    the scores of its image pairs are missing or changed.
    """
    scores = pair_scores(store.resolve(uri), split)
    if not scores:
        raise ValueError(f"{uri} must have the scores of each image pair, but its files do not contain them: score "
                         f"this version again: python -m flows.evaluate {uri}")
    return scores


@tracking.plain_errors()
def version_scores(uri: str, split: str) -> dict[str, Any]:
    """Return the scores of a registered version on the split `test` or `gate`, as {"scenes.CIDEr": 3.1, ...}.

    Raises ValueError if the version does not exist, or if the score file differs from the registered digest.
    """
    return scores_of(store.resolve(uri), split)


@tracking.plain_errors()
def version_text(uri: str, name: str) -> str:
    """Return the content of one text file of a registered version, without downloading the weights.

    `name` is the path of the file in the version, such as lineage/lineage.json. Raises ValueError if the version does
    not exist, and FileNotFoundError if the version has no such file.
    """
    return _text(f"{location(store.resolve(uri))}/{name}")


@tracking.plain_errors()
def version_tags(uri: str = paths.CHAMPION) -> dict[str, str]:
    """Return the MLflow tags of a registered version, and under the key `version` the number of this version.

    Raises ValueError if the version does not exist.
    """
    version = store.resolve(uri)
    return {**version.tags, "version": str(version.version)}


def pair_scores(version: ModelVersion, split: str = "gate") -> dict[str, Any]:
    """Return the scores of each image pair in a split, by benchmark, or {} if the version has no file with them.

    Raises ValueError if the file differs from the registered digest.
    """
    text = _registered_text(version, f"{SCORED}/{split}.json", f"{paths.SCORED}/{split}.json")
    return {} if text is None else json.loads(text)


def scores_of(version: ModelVersion, split: str = "gate") -> dict[str, Any]:
    """Return the scores of a registered version on a split as {"scenes.CIDEr": 3.1, ...}, without lists of values.

    If the version has no file with these scores, they are read from the MLflow tag scores_<split>, which old versions
    have. Raises ValueError if the file differs from the registered digest.
    """
    text = _registered_text(version, f"{SCORES}/{Path(TABLES[split]).name}", TABLES[split])
    if text is None:
        return json.loads(version.tags.get(f"scores_{split}", "{}"))
    return {key: value for key, value in tracking.flatten(json.loads(text)).items() if not isinstance(value, list)}


def _registered_text(version: ModelVersion, name: str, key: str) -> str | None:
    """Return the content of the score file `name` of a registered version, or None if the version has no such file.

    `key` is the path under which the MLflow tag scores_digest has the md5 of the file. Raises ValueError if the file
    has another md5.
    """
    source = f"{location(version)}/{name}"
    try:
        text = _text(source)
    except FileNotFoundError:
        return None
    got = hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()
    registered = json.loads(version.tags.get(SCORES_DIGEST, "{}")).get(key, got)
    if got != registered:
        raise ValueError(f"version {version.version}: {source} must have the registered md5 {registered}, got {got}, "
                         "so the file was changed: score the version again: "
                         f"python -m flows.evaluate models:/{NAME}/{version.version}")
    return text


def add_files(version: ModelVersion, source: Path, folder: str | None = None) -> None:
    """Upload all files of the folder `source` to a registered version, and replace its files with equal names."""
    location(version)
    tracking.client().log_model_artifacts(str(version.source).removeprefix("models:/"), str(source), folder)


def check_files(version: ModelVersion) -> None:
    """Raise ValueError unless the MLflow store has the model of a registered version with the registered digest."""
    source = location(version)
    with tempfile.TemporaryDirectory() as scratch, _missing_named(version):
        # Download the files again, because a copy in the local cache does not show that the server still has them.
        folder = _path(source) if _is_local(source) else _download(source, Path(scratch))
        _checked(_model_in(folder, version), version)


def location(version: ModelVersion) -> str:
    """Return the path or address of the folder in which MLflow stores the files of a registered version.

    Raises ValueError if this folder is outside the MLflow store, or if MLflow has no files for the version.
    """
    mlflow = tracking.client()
    source = mlflow.get_model_version_download_uri(NAME, str(version.version))
    if source.startswith("models:/"):
        with _missing_named(version):
            source = mlflow.get_logged_model(source.removeprefix("models:/")).artifact_location
    root = mlflow.get_experiment(tracking.experiment_id()).artifact_location
    if not _inside(source, root):
        raise ValueError(f"version {version.version}: its files must be inside the MLflow store '{root}', but MLflow "
                         f"at {tracking.where()} says that they are at '{source}'; register the model again")
    return source


def _inside(source: str, root: str) -> bool:
    """Return whether the path or address `source` is inside `root`, after resolving %-encoding and symbolic links."""
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
    """Return a local folder with the files of a registered version, downloading it once if MLflow is on a server."""
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
    """Return the folder `name` in `CACHE`. If it does not exist, `fill` creates it in a temporary folder first."""
    target = CACHE / name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            folder = fill(Path(scratch))
            try:
                folder.rename(target)
            except OSError:  # Another process may have created this folder in the cache while `fill` ran.
                if not target.is_dir():
                    raise
    return target


def _model_in(folder: Path, version: ModelVersion) -> Path:
    """Return the model folder of a registered version whose files are in `folder`.

    If `folder` contains reference.json instead of weights, DVC downloads the model by its md5 into the cache, once.
    """
    with _missing_named(version):
        reference = folder / REFERENCE
        if reference.exists():
            md5 = json.loads(reference.read_text(encoding="utf-8"))["md5"]
            return _cached(f"{_identity(version)}-weights",
                           lambda scratch: _checked(fetch(md5, scratch / "model"), version))
        model = folder / _data_path(folder)
        if not model.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"version {version.version}: the data path in its MLmodel file must be inside {folder}, "
                             f"got '{_data_path(folder)}'; register the model again")
        model.stat()
        return model


def _identity(version: ModelVersion) -> str:
    return version.tags.get(MODEL_DIGEST) or version.tags["weights_digest"]


def cached_names(tags: Mapping[str, str]) -> set[str]:
    """Return all names that a folder in `CACHE` can have if it belongs to a registered version with these tags."""
    digests = [tags[key] for key in (MODEL_DIGEST, "weights_digest") if key in tags]
    return {*digests, *(f"{digest}-weights" for digest in digests)}


def _checked(model: Path, version: ModelVersion) -> Path:
    """Return the model folder `model` after comparing its digest with the digest that was registered for `version`.

    An old version has a registered digest of the weights only, so only the weights are compared. Raises ValueError if
    the digests differ.
    """
    with _missing_named(version):
        digests = model_digests(model)
    what, got, registered = "files", digests.folder, version.tags.get(MODEL_DIGEST)
    if registered is None:
        what, got, registered = "weights", digests.weights, version.tags.get("weights_digest", "none")
    if got != registered:
        copies = [copy for name in cached_names(version.tags) if model.is_relative_to(copy := CACHE / name)]
        cure = f"remove {copies[0]}, so that it is downloaded again" if copies else "register the model again"
        raise ValueError(f"version {version.version}: the {what} in {model} must have the registered digest "
                         f"{registered[:12]}, got {got[:12]}, so they were changed: {cure}")
    return model


def _data_path(folder: Path) -> str:
    return str(YAML(typ="safe").load(folder / "MLmodel")["flavors"]["python_function"]["data"])


def _download(source: str, target: Path) -> Path:
    from mlflow.artifacts import download_artifacts

    return Path(download_artifacts(artifact_uri=source, dst_path=str(target), tracking_uri=tracking.uri()))


def _text(source: str) -> str:
    """Return the content of the text file at an MLflow address. Raises FileNotFoundError if it does not exist."""
    with tempfile.TemporaryDirectory() as scratch, _missing_as(FileNotFoundError, f"{source} does not exist"):
        return _download(source, Path(scratch)).read_text(encoding="utf-8")


def _missing_named(version: ModelVersion) -> AbstractContextManager[None]:
    """Turn errors about missing files in the `with` block into a ValueError with the number of the version."""
    return _missing_as(ValueError, f"version {version.version}: its files must be in the store of MLflow at "
                       f"{tracking.where()}, but they are missing",
                       "; restore them from a backup, or train and register the model again")


@contextmanager
def _missing_as(kind: type[Exception], message: str, cure: str = "") -> Iterator[None]:
    """Turn errors about missing files in the `with` block into an exception of the type `kind` with this message.

    Other errors of an MLflow server are raised unchanged.
    """
    from mlflow.exceptions import MlflowException
    from requests import RequestException

    try:
        yield
    except (MlflowException, OSError) as error:
        of_request = isinstance(error, (MlflowException, RequestException))
        if tracking.http_status(error) != 404 if of_request else isinstance(error, ConnectionError):
            raise
        raise kind(f"{message} ({' '.join(str(error).split())[:200]}){cure}") from None
