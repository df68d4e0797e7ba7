"""Tests of the files of a registered version: where they may be, and how large models are stored by reference."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from registered import Server, add, aliases, model, register, score_again, trained, write_lock, write_results

from onediff import registry, tracking
from onediff.model.digest import model_digests
from onediff.paths import CHAMPION
from onediff.registry.artifacts import MODEL_DIGEST, REFERENCE


def test_the_model_folder_of_a_version_contains_the_registered_bytes() -> None:
    add("a")
    folder = registry.model_folder("models:/onediff@candidate")
    assert (folder / "model.safetensors").read_bytes() == b"a"
    assert registry.model_folder("models:/onediff/1") == folder


def test_the_scores_of_each_pair_of_a_version_can_be_read() -> None:
    add("a", CIDEr=2.5)
    assert registry.scored_pairs("models:/onediff@candidate", "gate")["scenes"]["CIDEr"] == [2.5] * 200
    next(Path("mlflow-artifacts").rglob("scored/test.json")).unlink()
    with pytest.raises(ValueError, match=r"models:/onediff/1 must have the scores of each image pair, .*: python -m"):
        registry.scored_pairs("models:/onediff/1", "test")


def test_missing_files_of_a_version_are_reported_in_one_line() -> None:
    add("a")
    shutil.rmtree("mlflow-artifacts")
    with pytest.raises(ValueError, match=r"version 1: .*MLflow at sqlite.* are missing .*register"):
        registry.model_folder("models:/onediff/1")


@pytest.mark.parametrize("location", ["{tmp}/elsewhere", "{root}/../elsewhere", "{root}/%2e%2e/elsewhere", "s3://b/x",
                                   "{tmp}/mlflow-artifacts-not"])
def test_files_outside_the_store_are_not_read(location: str, store: Path) -> None:
    add("a")
    root = (store / "mlflow-artifacts").as_uri()
    move(location.format(tmp=store.as_uri(), root=root))
    for call in (registry.model_folder, registry.version_files, registry.scored_pairs):
        with pytest.raises(ValueError, match=r"version 1: its files must be inside the MLflow store '"):
            call("models:/onediff/1")
    with pytest.raises(ValueError, match="must be inside the MLflow store"):
        registry.promote()
    assert aliases() == {"1": ["candidate"]}


def move(location: str) -> None:
    """Change the location of the files in MLflow's database, as an attacker with access to the database could."""
    with sqlite3.connect("mlflow.db") as database:
        database.execute("UPDATE logged_models SET artifact_location = ?", [location])
        database.execute("UPDATE model_versions SET storage_location = ?, source = ?", [location, location])


def test_a_model_path_outside_the_folder_of_the_version_is_not_read(store: Path) -> None:
    add("a")
    described = next(Path("mlflow-artifacts").rglob("MLmodel"))
    described.write_text(described.read_text().replace("data: data/a\n", "data: ../../../../..\n"))
    with pytest.raises(ValueError, match=r"the data path in its MLmodel file must be inside .*, got '\.\./"):
        registry.model_folder("models:/onediff/1")


@pytest.fixture
def large_model(monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a model folder that a DVC stage created and that is too large to be copied into MLflow."""
    model("tune").rename("made")
    Path("dvc.yaml").write_text("stages:\n  tune:\n    cmd: mkdir -p data/models && cp -r made data/models/tune\n"
                                "    outs: [data/models/tune]\n")
    dvc("init", "--no-scm", "-q")
    dvc("repro", "-q")
    write_results()
    write_lock(Path("data/models/tune"))
    monkeypatch.setenv("ONEDIFF_REGISTER_BY_REFERENCE_GB", "0")
    return Path("data/models/tune")


def dvc(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "dvc", *words], check=True)


def test_a_large_model_is_registered_by_reference_and_downloaded_by_digest(large_model: Path) -> None:
    register(large_model)
    shutil.rmtree(large_model)
    files = registry.version_files("models:/onediff/1")
    assert not list(files.rglob("*.safetensors")) and (files / "data/tune/config.json").exists()
    assert '"path": "data/models/tune"' in (files / REFERENCE).read_text()
    assert registry.promote().promoted
    folder = registry.model_folder()
    assert (folder / "model.safetensors").read_bytes() == b"tune" and ".onediff" in folder.parts
    (folder / "config.json").write_text("{ }")
    with pytest.raises(ValueError, match=r"the files in .*-weights must .* remove .*-weights, so that"):
        registry.model_folder()
    shutil.rmtree(folder)
    assert registry.model_folder() == folder
    with pytest.raises(ValueError, match="is registered by reference, so MLflow does not store"):
        from mlflow.pyfunc import load_model

        load_model(CHAMPION)


def test_weights_with_another_digest_than_the_registered_one_are_not_used(large_model: Path) -> None:
    register(large_model)
    tracking.client().set_model_version_tag("onediff", "1", MODEL_DIGEST, "0" * 64)
    with pytest.raises(ValueError, match=r"version 1: the files in .* must have the registered digest 0000"):
        registry.model_folder("models:/onediff/1")
    tracking.client().set_model_version_tag("onediff", "1", MODEL_DIGEST, model_digests(large_model).folder)
    shutil.rmtree(".dvc/cache")
    with pytest.raises(ValueError, match=r"\.dir"):  # The message contains the md5 of the folder.
        registry.model_folder("models:/onediff/1")
    with pytest.raises(ValueError, match=r"\.dir"):
        registry.promote()
    assert aliases() == {"1": ["candidate"]}


def test_a_large_model_that_dvc_does_not_store_is_not_registered(large_model: Path) -> None:
    large_model.rename("elsewhere")
    with pytest.raises(ValueError, match=r"elsewhere is larger than register_by_reference_gb 0 of runtime\.yaml"):
        register(Path("elsewhere"))


@pytest.mark.slow
def test_a_version_on_a_server_is_downloaded_once_but_its_scores_are_read_again(server: Server) -> None:
    Path("carried").mkdir()
    Path("carried/README.md").write_text("one")
    with registry.sole_writer():
        version = register(trained("a"), carried=Path("carried"))
        fetched = registry.model_folder("models:/onediff@candidate")
        assert (fetched / "model.safetensors").read_bytes() == b"a" and ".onediff" in fetched.parts
        (fetched.parents[1] / "mark").touch()
        score_again(version, CIDEr=4.0)
        assert registry.scored_pairs("models:/onediff/1", "gate")["scenes"]["CIDEr"] == [4.0] * 200
        Path("carried/README.md").write_text("two")
        register(trained("a", CIDEr=5.0), carried=Path("carried"))
        assert (registry.version_files("models:/onediff/1") / "README.md").read_text() == "two"
        assert (registry.version_files("models:/onediff/1") / "mark").exists()
        assert registry.promote().promoted
        (registry.model_folder() / "config.json").write_text("{ }")
        with pytest.raises(ValueError, match=r"version 1: .*, so they were changed: remove .*downloaded again"):
            registry.model_folder()
        add("b", CIDEr=6.0)
        changed, = (path for path in (server.folder / "served").rglob("model.safetensors") if path.read_bytes() == b"b")
        changed.write_bytes(b"c")
        with pytest.raises(ValueError, match=r"version 2: the files in .* so they were changed"):
            registry.promote()
        shutil.rmtree(server.folder / "served")
        with pytest.raises(ValueError, match="version 2: its files must be in the store"):
            registry.promote()
        assert aliases() == {"1": ["champion"], "2": ["candidate"]}
    server.stop()
    with pytest.raises(ConnectionError, match=f"MLflow at {server.address}: "):
        registry.list_versions()


@pytest.mark.slow
def test_registering_on_a_shared_registry_changes_the_candidate_only_inside_sole_writer(server: Server) -> None:
    assert add("a") == "1"
    assert aliases() == {"1": []}
    with registry.sole_writer():
        registry.propose("1", by="flow run red-fox")
    assert aliases() == {"1": ["candidate"]} and registry.check_trail()[0].by == "flow run red-fox"
