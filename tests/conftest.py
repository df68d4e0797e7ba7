"""Fixtures that several test files share: small real objects instead of mocks."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", GX_ANALYTICS_ENABLED="false", MLFLOW_DISABLE_TELEMETRY="true", DO_NOT_TRACK="1",
                  TOKENIZERS_PARALLELISM="false", DS_ACCELERATOR="cpu")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell without job control starts background processes with SIGINT ignored, and child processes inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
from browser import chromium  # noqa: F401  # pytest registers the fixture through this import.

from onediff.config import Config, load_params
from onediff.data.record import Record

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def micro() -> Config:
    """The micro preset with absolute paths of the backbones, so that a test may run in any folder."""
    config = load_params(ROOT / "presets/micro.yaml")
    vision = config.model.vision.model_copy(update={"path": str(ROOT / config.model.vision.path)})
    model = config.model.model_copy(update={"vision": vision, "language": str(ROOT / config.model.language)})
    return config.model_copy(update={"model": model})


@pytest.fixture(scope="session")
def tiny_version(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project of tiny_project.py with one registered version, and `mlflow.db` beside it. Do not change it."""
    import tiny_project

    from onediff import tracking

    folder = tmp_path_factory.mktemp("tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        patch.setenv("PREFECT__FLOW_RUN_ID", "flow-7")
        patch.setenv(tracking.PARENT, "parent-5")
        project = tiny_project.make(folder / "project")
        patch.chdir(project)
        assert tiny_project.register(project, folder / "carried") == "1"
    return project


@pytest.fixture(scope="session")
def untrained(micro: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model of the micro preset with random weights. Do not change it."""
    from onediff.model.assemble import build

    folder = tmp_path_factory.mktemp("untrained")
    for part in build(micro.model, seed=5):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def scene_pairs(micro: Config) -> list[Record]:
    """Training pairs of five base scenes."""
    from onediff.data.synthesis.scenes.records import scene_records

    return [record for index in range(5) for record in scene_records(micro, "train", index)]


@pytest.fixture
def local_registry(empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project's folder with an empty MLflow store and committed promotion rules. The test runs in this folder."""
    from registered import git, write_rules

    monkeypatch.chdir(tmp_path)
    git("init", "--quiet")
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    write_rules(tmp_path / "mlflow/promotion.yaml")
    return tmp_path


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with the tables of MLflow, which tests copy because creating the tables is slow."""
    from onediff import tracking

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{path}")
        tracking.client()
    return path
