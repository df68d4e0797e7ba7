"""Fixtures of the tracking tests: an MLflow store that all of these tests share, and the tiny preset."""

from __future__ import annotations

from pathlib import Path

import pytest

from onediff import tracking
from onediff.config import Config, load_params

REPO = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"


@pytest.fixture(autouse=True)
def store(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    monkeypatch.delenv(tracking.PARENT, raising=False)


@pytest.fixture(scope="session")
def config() -> Config:
    return load_params(REPO / "presets/tiny.yaml")
