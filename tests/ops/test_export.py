"""Tests of `onediff export` with a real small model in a real MLflow store."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_project
from PIL import Image
from registered import register, write_lock, write_results

from onediff import registry
from onediff.config import Config
from onediff.ops.export import export

CARRIED = {"README.md": "# card\n", "lineage/lineage.json": '{"git": {}}'}


@pytest.fixture(scope="module")
def model_store(micro: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an MLflow store: version 1 is a small real model, version 2 has no model card."""
    from onediff.model.assemble import build

    folder = tmp_path_factory.mktemp("export")
    for part in build(micro.model, seed=3):
        part.save_pretrained(folder / "model")
    (folder / "other").mkdir()
    (folder / "other/model.safetensors").write_bytes(b"other")
    write_results(folder)
    for name, text in CARRIED.items():
        path = folder / "carried" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (folder / "bare/lineage").mkdir(parents=True)
    (folder / "bare/lineage/lineage.json").write_text("{}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        patch.chdir(folder)
        for model, carried in (("model", "carried"), ("other", "bare")):
            write_lock(folder / model)
            register(folder / model, carried=folder / carried)
    return folder


@pytest.fixture(autouse=True)
def store(model_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{model_store / 'mlflow.db'}")
    monkeypatch.chdir(tmp_path)


def test_the_exported_model_gives_the_captions_of_the_registered_model(model_store: Path) -> None:
    from onediff.inputs.processing import OneDiffProcessor
    from onediff.model.captioner import Captioner
    from onediff.model.onediff import OneDiffForConditionalGeneration

    folder = export("1", Path("new/folder"))
    model, processor = OneDiffForConditionalGeneration.from_pretrained(folder), OneDiffProcessor.from_pretrained(folder)
    pixels = np.random.default_rng(0).integers(0, 255, (6, 20, 30, 3), dtype=np.uint8)
    pairs = [(Image.fromarray(pixels[i]), Image.fromarray(pixels[i + 3])) for i in range(3)]
    expected = Captioner.load(registry.model_folder("models:/onediff/1"), device="cpu").caption(pairs, max_new_tokens=7)
    assert Captioner(model, processor).caption(pairs, max_new_tokens=7) == expected


def test_the_folder_contains_card_licence_and_lineage_and_no_temporary_file_remains() -> None:
    Path("empty").mkdir()
    folder = export("1", Path("empty"))
    assert {"README.md", "LICENSE", "lineage.json", "config.json", "model.safetensors",
            "tokenizer.json"} <= {path.name for path in folder.iterdir()}
    assert (folder / "README.md").read_text() == CARRIED["README.md"] and "Apache" in (folder / "LICENSE").read_text()
    assert json.loads((folder / "lineage.json").read_text()) == {"git": {}}
    assert [path.name for path in Path().iterdir()] == ["empty"]


def test_a_folder_that_contains_files_is_refused_and_not_changed() -> None:
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="mine must be new or empty, but it contains files: choose another folder"):
        export("1", Path("mine"))
    assert [path.name for path in Path("mine").iterdir()] == ["notes.txt"]


def test_damaged_weights_are_not_exported() -> None:
    with (tiny_project.flipped(registry.model_folder("models:/onediff/1") / "model.safetensors"),
          pytest.raises(ValueError, match=r"must have the registered digest \w{12}, got \w{12}, so they were changed")):
        export("1", Path("out"))
    assert not list(Path().iterdir())


def test_a_version_without_a_card_is_not_exported() -> None:
    with pytest.raises(FileNotFoundError, match="version 2 has no model card: register the model again"):
        export("2", Path("out"))
