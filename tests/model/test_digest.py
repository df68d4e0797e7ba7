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


def test_the_digests_equal_a_simple_reference(folder: Path) -> None:
    names = ["config.json", "model-1.safetensors", "model-2.safetensors", "more/tokenizer.json"]
    listing = [[name, hashlib.sha256((folder / name).read_bytes()).hexdigest()] for name in names]
    both = b"".join((folder / name).read_bytes() for name in names[1:3])
    digests = model_digests(folder)
    assert digests.folder == hashlib.sha256(json.dumps(listing).encode()).hexdigest()
    assert digests.weights == weights_digest(folder) == hashlib.sha256(both).hexdigest()


def test_the_digest_depends_on_names_and_contents_but_not_on_the_path_of_the_folder(folder: Path) -> None:
    digests = {model_digests(folder).folder}
    # The digest ignores folders with this name inside the model folder, but the model folder may be in such a folder.
    (folder.parent / "__pycache__").mkdir()
    folder = folder.rename(folder.parent / "__pycache__/elsewhere")
    assert model_digests(folder).folder in digests
    for name, text in (("config.json", "other"), ("more/tokenizer.json", "other"), ("new.json", "")):
        (folder / name).write_text(text)
        digests.add(model_digests(folder).folder)
    (folder / "new.json").rename(folder / "newer.json")
    digests.add(model_digests(folder).folder)
    assert len(digests) == 5


def test_a_folder_without_weights_has_no_digest(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors does not exist: give the folder of a trained "
                                                r"model, such as data/models/tune"):
        model_digests(folder)
