from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from onediff.model.digest import model_digests, weights_digest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "more").mkdir(parents=True)
    for name in ("model-2.safetensors", "model-1.safetensors", "config.json", "more/tokenizer.json"):
        (folder / name).write_text(f"bytes of {name}")
    return folder


def test_the_digests_are_those_of_a_slow_and_obvious_reference(folder: Path) -> None:
    names = ["config.json", "model-1.safetensors", "model-2.safetensors", "more/tokenizer.json"]
    listing = [[name, hashlib.sha256((folder / name).read_bytes()).hexdigest()] for name in names]
    both = b"".join((folder / name).read_bytes() for name in names[1:3])
    digests = model_digests(folder)
    assert digests.folder == hashlib.sha256(json.dumps(listing).encode()).hexdigest()
    assert digests.weights == weights_digest(folder) == hashlib.sha256(both).hexdigest()


def test_every_name_and_every_byte_counts_but_not_where_the_folder_is(folder: Path) -> None:
    seen = {model_digests(folder).folder}
    (folder.parent / "__pycache__").mkdir()  # a name that counts for nothing below the folder
    folder = folder.rename(folder.parent / "__pycache__/elsewhere")
    assert model_digests(folder).folder in seen
    for name, text in (("config.json", "other"), ("more/tokenizer.json", "other"), ("new.json", "")):
        (folder / name).write_text(text)
        seen.add(model_digests(folder).folder)
    (folder / "new.json").rename(folder / "newer.json")
    seen.add(model_digests(folder).folder)
    assert len(seen) == 5


def test_a_folder_without_weights_has_no_digest(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors does not exist"):
        model_digests(folder)
