"""SHA-256 digests of the files of a model folder, by which a model is identified."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from onediff.files import sha256_of

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
    """Both digests. Raises FileNotFoundError for a folder without weights."""
    weights = weights_digest(folder)
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    listing = [[name, sha256_of(folder / name)]
               for name in sorted(file.as_posix() for file in files if not _NOT_MODEL & {*file.parts})]
    return ModelDigests(hashlib.sha256(json.dumps(listing).encode()).hexdigest(), weights)


def weights_digest(folder: Path) -> str:
    """SHA-256 over the safetensors files in order of name, as in data/runs/*.json. Raises as `model_digests`."""
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise FileNotFoundError(f"{folder}/model.safetensors not found: 'dvc repro' makes it")
    total = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: total)  # adds the bytes of the file to `total`
    return total.hexdigest()
