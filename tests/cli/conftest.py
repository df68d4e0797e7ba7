from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that contains only params.yaml, the paper preset. The test runs in this folder."""
    shutil.copy(Path(__file__).resolve().parents[2] / "presets/paper.yaml", tmp_path / "params.yaml")
    monkeypatch.chdir(tmp_path)
    return tmp_path
