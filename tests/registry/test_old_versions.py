"""Versions that the code of commit 601f16a registered. They have a digest of their weights but none of their folder."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path

import pytest
from registered import add, aliases, row, score_again

from onediff import registry

OLD = Path(__file__).parent / "store_of_601f16a"


@pytest.fixture(autouse=True)
def old(store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A local MLflow store with the two versions that the code of commit 601f16a registered."""
    shutil.copytree(OLD / "mlflow-artifacts", store / "mlflow-artifacts")
    with sqlite3.connect(store / "old.db") as database:
        database.executescript((OLD / "store.sql").read_text().replace("{root}", str(store)))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store / 'old.db'}")
    return store


def test_an_old_version_loads_with_checked_weights_and_a_rollback_to_it_works(old: Path) -> None:
    assert aliases() == {"1": ["previous"], "2": ["candidate", "champion"]}
    folder = registry.model_folder()
    assert (folder / "model.safetensors").read_bytes() == b"b" and (folder / "tokenizer.json").exists()
    assert registry.scored_pairs("models:/onediff/2", "gate")["scenes"]["CIDEr"] == [3.5] * 200
    assert registry.rollback() == "1" and registry.check_trail()[-1].action == "rollback"
    assert (registry.model_folder() / "model.safetensors").read_bytes() == b"a"
    (registry.model_folder() / "model.safetensors").write_bytes(b"c")
    with pytest.raises(ValueError, match=r"version 1: the weights in .* they were changed"):
        registry.model_folder()


def test_an_old_champion_is_compared_with_a_new_candidate() -> None:
    add("c", CIDEr=3.4)
    assert "scenes.CIDEr is 3.4, the champion's 3.5" in registry.promote().reasons[0]
    add("d", CIDEr=4.0)
    assert registry.promote().promoted and aliases()["2"] == ["previous"]


def test_an_old_version_is_promoted_only_after_it_was_scored_again() -> None:
    registry.rollback()
    assert registry.promote("2").reasons[0].startswith("the version must have a digest that connects its scores with")
    score_again("2", CIDEr=5.0)
    assert registry.promote("2").promoted and row("2")["aliases"] == ["candidate", "champion"]
    (registry.model_folder() / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"version 2: the files in .* they were changed"):
        registry.model_folder()
