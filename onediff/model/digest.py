"""SHA-256 digests of the files of a model folder, by which a model is identified."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

DIGEST_FILE = "model.sha256"  # beside a registered model folder: its digest, for programs that cannot ask the registry
_NOT_MODEL = {"__pycache__", ".gitignore"}


@dataclass(frozen=True)
class ModelDigests:
    """`folder`: over the name and the bytes of every file, which is the identity of a model; `weights`: over the bytes
    of the safetensors files alone.
    """

    folder: str
    weights: str


def model_digests(folder: Path) -> ModelDigests:
    """Both digests, each file read once. Raises FileNotFoundError for a folder without weights."""
    weights, listing = hashlib.sha256(), []
    _check_weights(folder)
    files = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    for name, path in sorted((name.as_posix(), path) for name, path in files.items() if not _NOT_MODEL & {*name.parts}):
        is_weights = path.parent == folder and path.suffix == ".safetensors"
        listing.append([name, _read(path, weights if is_weights else None)])
    return ModelDigests(hashlib.sha256(json.dumps(listing).encode()).hexdigest(), weights.hexdigest())


def weights_digest(folder: Path) -> str:
    """SHA-256 over the safetensors files in order of name, as in data/runs/*.json."""
    total = hashlib.sha256()
    _check_weights(folder)
    for path in sorted(folder.glob("*.safetensors")):
        _read(path, total)
    return total.hexdigest()


def _check_weights(folder: Path) -> None:
    if not any(folder.glob("*.safetensors")):
        raise FileNotFoundError(f"{folder}/model.safetensors not found: 'dvc repro' makes it")


def _read(path: Path, total: hashlib._Hash | None) -> str:
    """The file's SHA-256; its bytes are added to `total`, too."""
    own = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            own.update(block)
            if total:
                total.update(block)
    return own.hexdigest()
