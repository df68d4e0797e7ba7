"""Tests that run the stages `probe`, `validate` and `build` one after the other on generated pairs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from ruamel.yaml import YAML

from onediff.config import Config
from onediff.data.record import SPLITS, Record, read_records, write_shards
from onediff.data.synthesis.edits.records import edit_record
from onediff.stages.build import build
from onediff.stages.probe import probe
from onediff.stages.validate import validate

ROOT = Path(__file__).parents[2]
NUM_PAIRS = 11


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    values = YAML(typ="safe").load((ROOT / "presets/tiny.yaml").read_text())
    values["data"] |= {"generated": ["edits"], "tolerance": {"generated": 0.1, "raw": 0.1}}
    values["align"]["mixture"] = values["tune"]["mixture"] = {"edits": 1}
    YAML().dump(values, tmp_path / "params.yaml")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ONEDIFF_WORKERS", "1")
    config = Config.model_validate(values)
    for split in SPLITS:
        write_shards(
            [edit_record(config, split, index) for index in range(NUM_PAIRS)],
            tmp_path / "data/synthetic/edits",
            split,
            shard_pairs=7,
        )
    yield tmp_path


def change(folder: Path, split: str, index: int, **values: object) -> None:
    """Change fields of one record in the generated shards of a split."""
    records: list[Record] = list(read_records(folder / "data/synthetic/edits", f"{split}-*.parquet"))
    records[index] = replace(records[index], **values)  # type: ignore[arg-type]
    write_shards(records, folder / "data/synthetic/edits", split, shard_pairs=7)


def test_bad_pairs_are_quarantined_and_two_builds_of_the_other_pairs_are_equal(folder: Path) -> None:
    change(folder, "train", 2, after=b"\x89PNG\r\n\x1a\nbroken")
    change(folder, "val", 4, references=["fine", " "])
    probe()
    validate()
    bad = pd.read_parquet(folder / "data/quarantine.parquet")
    assert list(bad["pair_id"]) == ["edits-train-000002", "edits-val-000004"]
    assert (folder / "data/reports/validation/index.html").exists()
    builds = []
    for _ in range(2):
        build()
        builds.append({path.name: path.read_bytes() for path in (folder / "data/diffcap").iterdir()})
    assert builds[0] == builds[1]
    assert sorted(builds[0]) == ["README.md", "card.json", *(f"{split}-00000.parquet" for split in sorted(SPLITS))]
    ids = [record.pair_id for record in read_records(folder / "data/diffcap")]
    assert len(ids) == len(set(ids)) == 4 * NUM_PAIRS - 2
    assert not set(ids) & set(bad["pair_id"])
    assert json.loads(builds[0]["card.json"])["num_quarantined"] == 2


def test_validate_writes_the_report_and_the_quarantine_before_it_stops(folder: Path) -> None:
    for index in range(6):
        change(folder, "test", index, references=[])
    probe()
    with pytest.raises(
        ValueError,
        match=r"6 of 44 generated pairs are bad .*first: edits-test-000000: no caption\); see data/reports/validation",
    ):
        validate()
    assert len(pd.read_parquet(folder / "data/quarantine.parquet")) == 6
    assert "6 bad" in (folder / "data/reports/validation/index.html").read_text()


def test_a_missing_input_of_a_stage_is_refused(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data/probe\.parquet does not exist"):
        validate()
    (folder / "data/synthetic/edits").rename(folder / "data/synthetic/moved")
    with pytest.raises(FileNotFoundError, match=r"data/synthetic/edits/\*\.parquet does not exist"):
        probe()
