from __future__ import annotations

from pathlib import Path

import pytest
from published_sets import picture, put

from onediff.config import Config, load_params
from onediff.data.sources.catalog import CATALOG
from onediff.data.sources.status import as_text, status

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def config() -> Config:
    return load_params(ROOT / "presets/paper.yaml")


def test_the_status_of_every_source_contains_licence_missing_files_and_next_step(
        config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = {row["source"]: row for row in status(config)}
    assert set(rows) == {*CATALOG, "coco"}
    assert rows["spot_the_diff"]["missing"] == "train.json, val.json, test.json, images"
    assert rows["spot_the_diff"]["todo"].startswith("onediff data fetch spot_the_diff; put into data/raw/spot_the_diff")
    assert rows["instruct_pix2pix"]["size"] == "436 GB"
    assert all(row["todo"] and row["licence"] for row in rows.values())
    assert {name for name, row in rows.items() if row["used"]} == {*config.data.raw, *config.data.retrieved,
                                                                   *config.data.diffused}
    assert "to do: onediff data fetch llava_558k\n" in as_text(list(rows.values())) + "\n"
    assert not any(row["used"] for row in status(None))


def test_the_status_lists_present_files_and_the_number_of_images_that_the_stage_read_missed(
        config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val", "test"):
        put(tmp_path / f"data/raw/spot_the_diff/annotations/{split}.json", [])
    row = {row["source"]: row for row in status(config)}["spot_the_diff"]
    assert (row["missing"], row["todo"][:33]) == ("images", "put into data/raw/spot_the_diff: ")
    picture(tmp_path / "data/raw/spot_the_diff/images/1.png", 1)
    row = {row["source"]: row for row in status(config)}["spot_the_diff"]
    assert (row["present"], row["missing"]) == ("train.json, val.json, test.json, images", "")
    assert row["todo"] == "nothing; 'onediff data read spot_the_diff data/raw/spot_the_diff' counts the pairs"
    put(tmp_path / "data/pairs/spot_the_diff/report.json", {"splits": {"test": {"missing_images": 1234}}})
    row = {row["source"]: row for row in status(config)}["spot_the_diff"]
    assert row["missing"] == "1,234 images by name (data/pairs/spot_the_diff/report.json)"


def test_a_json_file_of_conversations_is_the_table_of_a_source_of_your_own(config: Config, tmp_path: Path,
                                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    own = config.model_copy(update={"data": config.data.model_copy(update={"raw": ["mine"]})})
    picture(tmp_path / "data/raw/mine/a.png", 1)
    assert {row["source"]: row for row in status(own)}["mine"]["missing"] == "pairs.csv, pairs.jsonl"
    put(tmp_path / "data/raw/mine/differences.json", [])
    row = {row["source"]: row for row in status(own)}["mine"]
    assert (row["present"], row["missing"]) == ("differences.json, images", "")


def test_no_file_counts_as_missing_if_the_folder_contains_an_archive(config: Config, tmp_path: Path,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "data/raw/clevr_change/clevr_change.tar.gz", "")
    row = {row["source"]: row for row in status(config)}["clevr_change"]
    assert (row["present"], row["missing"]) == ("clevr_change.tar.gz", "")


def test_every_reader_belongs_to_a_source_of_the_catalog() -> None:
    readers = {path.stem for path in (ROOT / "onediff/data/sources/readers").glob("*.py")} - {"__init__", "folder"}
    assert {entry.read.__module__.rpartition(".")[2] for entry in CATALOG.values()} == readers
    for entry in CATALOG.values():
        assert entry.addresses or entry.manual
        assert all(address.startswith("http") for address in entry.addresses.values())
        assert not any(Path(path).is_absolute() or ".." in path for path in entry.addresses)


def test_a_report_of_the_stage_retrieve_without_counts_of_missing_images_is_accepted(
        config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "data/pairs/coco/report.json", {"images": 5, "pairs": 2, "unreadable": {}})
    row = {row["source"]: row for row in status(config)}["coco"]
    assert row["missing"] == "images"
