"""Tests of the stage `read`, which converts the files of a published dataset, or of your own pairs, to shards."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from published_sets import bird_row, bird_table, picture, put, spot_entries
from ruamel.yaml import YAML

from onediff.data.record import read_records
from onediff.stages.read import read

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ["spot_the_diff", "birds_to_words", "mine"]


def configure(folder: Path, **data: Any) -> None:
    values = YAML(typ="safe").load((ROOT / "presets/micro.yaml").read_text())
    values["data"] |= {"raw": SOURCES, "shard_pairs": 3} | data
    YAML().dump(values, folder / "params.yaml")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    configure(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ONEDIFF_SCRATCH", "scratch")
    return tmp_path


def create_own_pairs(folder: Path, count: int) -> None:
    """Write `count` pairs of images and pairs.csv; pairs with an even number are in `train`, the others in `test`."""
    rows = [f"{k}_a.png,{k}_b.png,change {k},{('train', 'test')[k % 2]}" for k in range(count)]
    put(folder / "pairs.csv", "\n".join(["before,after,reference,split", *rows]) + "\n")
    for k in range(count):
        picture(folder / f"{k}_a.png", k)
        picture(folder / f"{k}_b.png", k + 100)


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_own_pairs_are_converted_to_shards_and_a_report_and_a_second_run_gives_equal_files(project: Path) -> None:
    create_own_pairs(project / "data/raw/mine", 11)
    read("mine")
    first = shards(project / "data/pairs/mine")
    assert sorted(first) == ["report.json", "test-00000.parquet", "test-00001.parquet", "train-00000.parquet",
                             "train-00001.parquet"]
    read("mine")
    assert shards(project / "data/pairs/mine") == first
    records = {record.pair_id: record for record in read_records(project / "data/pairs/mine")}
    assert len(records) == 11
    record = records["mine-test-000002"]
    assert record.after == (project / "data/raw/mine/1_b.png").read_bytes()
    assert record.references == ["change 1"]
    report = json.loads(first["report.json"])
    assert (report["complete"], report["partial"], report["splits"]["test"]["pairs"]) == (True, False, 5)


def test_a_missing_image_stops_the_stage_with_a_report_unless_data_partial_lists_the_source(project: Path) -> None:
    create_own_pairs(project / "data/raw/mine", 3)
    (project / "data/raw/mine/1_b.png").unlink()
    message = (r"data/raw/mine differs from the published dataset: test: 1 image missing \(first: 1_b\.png\); "
               r"data/reports/read/mine\.json lists everything.* add mine to data\.partial")
    with pytest.raises(ValueError, match=message):
        read("mine")
    assert json.loads((project / "data/reports/read/mine.json").read_text())["missing"] == ["1_b.png"]
    assert not (project / "data/pairs/mine").exists()
    configure(project, partial=["mine"])
    read("mine")
    assert not (project / "data/reports/read/mine.json").exists()
    report = json.loads((project / "data/pairs/mine/report.json").read_text())
    assert (report["complete"], report["partial"], report["missing"]) == (False, True, ["1_b.png"])
    pairs = list(read_records(project / "data/pairs/mine", "test-*.parquet"))
    assert len(pairs) == 1, "a pair with a missing image must stay in the test split"
    assert (pairs[0].after, pairs[0].provenance["missing"]) == (b"", ["1_b.png"])


def test_a_dataset_with_fewer_records_than_were_published_stops_the_stage(project: Path) -> None:
    folder = project / "data/raw/spot_the_diff"
    for split in ("train", "val", "test"):
        put(folder / f"{split}.json", spot_entries(split)[: -10 if split == "test" else None])
    with pytest.raises(ValueError, match=r"test: 1,394 records, but 1,404 were published, .*missing .first: 0\.png"):
        read("spot_the_diff")
    report = json.loads((project / "data/reports/read/spot_the_diff.json").read_text())
    assert len(report["missing"]) == 2 * (8566 + 1493 + 1270), "the report must list every missing image"


def test_images_in_an_archive_are_read(project: Path) -> None:
    folder = project / "data/raw/birds_to_words"
    put(folder / "birds-to-words-v1.0.tsv", bird_table([bird_row(3, split, 1, "x") for split in ("train", "test")]))
    image = picture(project / "31.jpg", 1)
    with zipfile.ZipFile(folder / "photos.zip", "w") as archive:
        archive.write(image, "photos/31.jpg")
        archive.write(picture(project / "32.png", 2), "photos/32.png")
    read("birds_to_words")
    assert next(read_records(project / "data/pairs/birds_to_words", "test-*")).before == image.read_bytes()
    assert len(list((project / "scratch/unpacked").iterdir())) == 1


def test_a_source_that_params_yaml_does_not_list_and_a_source_without_a_folder_are_refused(project: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.raw must list 'coco', but lists spot_the_diff"):
        read("coco")
    with pytest.raises(FileNotFoundError, match=r"data/raw/mine does not exist or is not a folder"):
        read("mine")
    with pytest.raises(FileNotFoundError, match=r"data/raw/spot_the_diff does not exist: run 'onediff data fetch"):
        read("spot_the_diff")
