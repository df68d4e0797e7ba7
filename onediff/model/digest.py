"""One name for weights: the SHA-256 of what is in the files."""

from __future__ import annotations

import hashlib
from pathlib import Path


def weights_digest(folder: Path) -> str:
    """SHA-256 over the safetensors files in order of name, as in data/runs/*.json."""
    total, shards = hashlib.sha256(), sorted(folder.glob("*.safetensors"))
    if not shards:
        raise FileNotFoundError(f"{folder}/model.safetensors not found: 'dvc repro' makes it")
    for path in shards:
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                total.update(block)
    return total.hexdigest()
