from __future__ import annotations

import shutil
import socket
import threading
from pathlib import Path

import pytest
from registered import register, write_lock, write_results

from onediff import registry
from onediff.config import Runtime
from onediff.ops.serving import claims_change, current_version, load_version, read_key, serve
from onediff.paths import CHAMPION


@pytest.fixture
def model(untrained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(untrained, tmp_path / "models/first")


def promoted(folder: Path, cider: float) -> str:
    """Register a model folder with this score, make it the champion, and return the number of the version."""
    write_results(CIDEr=cider)
    write_lock(folder)
    version = register(folder)
    assert registry.promote(version).promoted
    return version


def test_the_server_follows_the_champion_and_checks_its_files(model: Path, local_registry: Path) -> None:
    assert promoted(model, 3.0) == current_version(CHAMPION) == "1"
    other = Path(shutil.copytree(model, model.with_name("second")))
    (other / "note.txt").write_text("other files")
    assert promoted(other, 4.0) == current_version(CHAMPION) == "2"
    loaded = load_version(CHAMPION, "1", Runtime(device="cpu", usage_log=str(local_registry / "usage")))
    assert (loaded.name, loaded.digest) == ("1", registry.version_tags("models:/onediff/1")["model_digest"])
    assert loaded.usage_log is not None and loaded.usage_log.model == "models:/onediff/1"
    weights = registry.model_folder("models:/onediff/2") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="must have the registered digest"):
        load_version(CHAMPION, "2", Runtime())


def test_a_folder_is_served_under_its_name_and_no_code_in_it_is_run(model: Path, tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    (model / "MLmodel").write_text("flavors: {python_function: {loader_module: evil, code: .}}")
    (model / "evil.py").write_text(f"open({str(proof)!r}, 'w')")
    assert current_version(str(model)) == "first"
    loaded = load_version(str(model), "first", Runtime(device="cpu"))
    assert (loaded.name, len(loaded.digest), loaded.usage_log) == ("first", 64, None)
    assert not proof.exists()


def test_a_change_of_the_files_does_not_change_the_loaded_version(model: Path) -> None:
    loaded = load_version(str(model), "first", Runtime(device="cpu"))
    weights = {name: value.clone() for name, value in loaded.captioner.model.state_dict().items()}
    with (model / "model.safetensors").open("r+b") as file:
        file.write(bytes((model / "model.safetensors").stat().st_size))
    assert all(value.equal(weights[name]) for name, value in loaded.captioner.model.state_dict().items())


def test_a_registry_that_does_not_answer_is_reported_before_torch_is_imported(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(threading.Thread, "start", lambda thread: pytest.fail(f"{thread.name} was started"))
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    with pytest.raises(ValueError, match=rf"MLflow at http://127.0.0.1:{port} cannot be reached .*: start the server"):
        serve(CHAMPION, host="127.0.0.1", port=0, api_key=None, report=pytest.fail)


@pytest.mark.parametrize(("caption", "changed"), [
    ("nothing has changed", False), ("the small red metal cube was removed", True), ("hello", None)])
def test_a_caption_claims_a_change_or_none_or_cannot_be_read(caption: str, changed: bool | None) -> None:
    assert claims_change(caption) is changed


def test_the_key_is_read_from_the_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "key"
    monkeypatch.delenv("ONEDIFF_API_KEY", raising=False)
    assert read_key(None) is None
    monkeypatch.setenv("ONEDIFF_API_KEY", "sesame")
    assert read_key(None) == "sesame"
    path.write_text("open\n")
    assert read_key(path) == "open"
    path.write_text("\n")
    with pytest.raises(ValueError, match="must contain the API key, but is empty"):
        read_key(path)
    for key in ("two words", "first\nsecond", "sësame"):
        path.write_text(key, encoding="utf-8")
        with pytest.raises(ValueError, match="the API key must be one word of ASCII"):
            read_key(path)
    with pytest.raises(FileNotFoundError):
        read_key(tmp_path / "nothing")
