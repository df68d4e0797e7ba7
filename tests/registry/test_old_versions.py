"""Versions that commit 601f16a registered: they have no digest of their folder, only of their weights."""

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
    shutil.copytree(OLD / "mlflow-artifacts", store / "mlflow-artifacts")
    with sqlite3.connect(store / "old.db") as database:
        database.executescript((OLD / "store.sql").read_text().replace("{root}", str(store)))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store / 'old.db'}")
    return store


def test_they_load_and_can_be_rolled_back_to_and_their_weights_are_checked(old: Path) -> None:
    assert aliases() == {"1": ["previous"], "2": ["candidate", "champion"]}
    folder = registry.model_folder()
    assert (folder / "model.safetensors").read_bytes() == b"b" and (folder / "tokenizer.json").exists()
    assert registry.scored_pairs("models:/onediff/2", "gate")["scenes"]["CIDEr"] == [3.5] * 200
    assert registry.rollback() == "1" and registry.check_trail()[-1].action == "rollback"
    assert (registry.model_folder() / "model.safetensors").read_bytes() == b"a"
    (registry.model_folder() / "model.safetensors").write_bytes(b"c")
    with pytest.raises(ValueError, match=r"version 1: the weights in .* they were changed"):
        registry.model_folder()


def test_one_of_them_is_compared_with_a_new_candidate() -> None:
    add("c", CIDEr=3.4)
    assert "scenes.CIDEr is 3.4, the champion's 3.5" in registry.promote().reasons[0]
    add("d", CIDEr=4.0)
    assert registry.promote().promoted and aliases()["2"] == ["previous"]


def test_one_of_them_is_promoted_only_after_its_scores_are_bound_to_its_folder() -> None:
    registry.rollback()
    assert registry.promote("2").reasons[0].startswith("no digest says that its scores are those of its model")
    score_again("2", CIDEr=5.0)
    assert registry.promote("2").promoted and row("2")["aliases"] == ["candidate", "champion"]
    (registry.model_folder() / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"version 2: the files in .* they were changed"):
        registry.model_folder()
