"""SHA-256 digests that identify a model: one over all files of the model folder, and one over the weights alone."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from onediff.files import sha256_of
from onediff.paths import TRAINED

# This file contains the digest of a registered model, for programs that have no access to the MLflow registry.
DIGEST_FILE = "model.sha256"
_NOT_MODEL = {"__pycache__", ".gitignore"}


@dataclass(frozen=True)
class ModelDigests:
    """The two SHA-256 digests of a model folder.

    `folder` is computed from the names and the bytes of all files, and identifies the model. `weights` is computed
    only from the bytes of the safetensors files.
    """

    folder: str
    weights: str


def model_digests(folder: Path) -> ModelDigests:
    """Compute both digests of a model folder. Raises FileNotFoundError if the folder has no safetensors file."""
    weights = weights_digest(folder)
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    listing = [[name, sha256_of(folder / name)]
               for name in sorted(file.as_posix() for file in files if not _NOT_MODEL & {*file.parts})]
    return ModelDigests(hashlib.sha256(json.dumps(listing).encode()).hexdigest(), weights)


def checked_digests(folder: Path) -> ModelDigests:
    """Compute both digests of a model folder, and compare them with the registered digest if there is one.

    A registered version has the file DIGEST_FILE in one of the two folders above the model folder. Raises ValueError
    if the files differ from the registered digest, and FileNotFoundError if the folder has no safetensors file.
    """
    digests = model_digests(folder)
    for parent in folder.parents[:2]:
        if (parent / DIGEST_FILE).exists():
            registered = (parent / DIGEST_FILE).read_text(encoding="utf-8").strip()
            if digests.folder != registered:
                raise ValueError(f"{folder}: the files must have the registered digest {registered[:12]}, got "
                                 f"{digests.folder[:12]}; they were changed after registration: register the model "
                                 "again")
    return digests


def weights_digest(folder: Path) -> str:
    """Compute the SHA-256 digest of the bytes of all safetensors files in a folder, in alphabetical order.

    Raises FileNotFoundError if the folder has no safetensors file.
    """
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise FileNotFoundError(f"{folder}/model.safetensors does not exist: give the folder of a trained model, such "
                                f"as {TRAINED}, which 'dvc repro' writes")
    total = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: total)  # updates `total`
    return total.hexdigest()
