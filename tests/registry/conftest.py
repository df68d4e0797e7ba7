"""Fixtures of the registry tests: each test has a local MLflow store, and may use a real MLflow server."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from registered import Server


@pytest.fixture(autouse=True)
def store(local_registry: Path) -> Path:
    return local_registry


@pytest.fixture
def server(store: Path, empty_store: Path, tmp_path_factory: pytest.TempPathFactory,
           monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A running MLflow server with an empty database, which is the registry of the test."""
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(empty_store, folder / "server.db")
    running = Server(folder)
    running.start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", running.address)
    yield running
    running.stop()
