"""Tests of the stages `probe` and `validate` on shards with raw pairs, generated pairs and general instruction data."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from ruamel.yaml import YAML

from onediff.data.record import SPLITS, Record, write_shards
from onediff.stages.probe import probe
from onediff.stages.validate import validate

ROOT = Path(__file__).parents[2]
PHOTOS = ROOT.parent / "shared/cases/pairs"
Project = Callable[..., Path]


def png(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(256, size=(37, 53, 3)).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def records(source: str, num_pairs: int = 11) -> list[Record]:
    """Return `num_pairs` records of each split, in which no image occurs twice."""
    start = 1000 * len(source)
    return [Record(f"{source}-{split}-{k}", source, split, f"{source}-{split}-{k}", png(start + 200 * number + 2 * k),
                   png(start + 200 * number + 2 * k + 1), ["the left bird went away"], "What changed?", "unlabelled",
                   {"names": [f"{k}.png", f"{k}_2.png"], "official_split": split})
            for number, split in enumerate(SPLITS) for k in range(num_pairs)]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """Return a function that creates a project with raw and generated records and changed settings of `data`.

    The test runs in the folder of this project.
    """

    def make(own: list[Record], generated: list[Record] | None = None, **data: Any) -> Path:
        values = YAML(typ="safe").load((ROOT / "presets/tiny.yaml").read_text())
        values["data"] |= {"generated": ["edits"] if generated else [], "raw": ["own"],
                           "tolerance": {"raw": 0.1, "generated": 0.1}} | data
        for phase in ("align", "tune"):
            values[phase]["mixture"] = {"own": 1}
        YAML().dump(values, tmp_path / "params.yaml")
        for folder, records in (("pairs/own", own), ("synthetic/edits", generated or [])):
            for split in SPLITS:
                write_shards((record for record in records if record.split == split), tmp_path / "data" / folder,
                             split, shard_pairs=7)
        return tmp_path

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ONEDIFF_WORKERS", "1")
    return make


def change(records: list[Record], pair_id: str, **values: Any) -> list[Record]:
    """Return the records, with changed fields of the record that has this pair id."""
    return [replace(record, **values) if record.pair_id == pair_id else record for record in records]


def test_every_bad_pair_is_quarantined_with_all_reasons(project: Project) -> None:
    own = change(records("own"), "own-train-2", after=b"\x89PNG\r\n\x1a\nbroken", references=["fine", " "])
    own = change(own, "own-val-4", references=["w " * 10_000])
    folder = project(own, change(records("edits"), "edits-gate-3", references=["bell\x07"]))
    probe()
    validate()
    bad = pd.read_parquet(folder / "data/quarantine.parquet").set_index("pair_id")
    assert sorted(bad.index) == ["edits-gate-3", "own-train-2", "own-val-4"]
    assert bad.loc["own-train-2", "reasons"] == "an image cannot be read; an empty caption"
    assert bad.loc["own-val-4", "reasons"] == "a caption of more than 500 words"
    assert list(bad["suite"]) == ["generated", "raw", "raw"]
    page = (folder / "data/reports/validation/index.html").read_text()
    assert "This data may be used" in page
    # The page shows the readable image of the broken pair twice, once for each of two reasons.
    assert page.count("data:image/jpeg") == 6


def test_a_missing_test_image_stops_the_stage_unless_data_partial_lists_the_source(project: Project) -> None:
    without_after = {"after": b"", "provenance": {"names": ["7.png", "7_2.png"], "missing": ["7_2.png"]}}
    own = change(records("own"), "own-test-7", **without_after)
    folder = project(own)
    probe()
    with pytest.raises(ValueError, match=r"^own: 1 test pair is bad \(first: own-test-7: an image is missing \(after: "
                                         r"7_2\.png is missing\)\), but the test split of a published source"):
        validate()
    assert list(pd.read_parquet(folder / "data/quarantine.parquet")["pair_id"]) == ["own-test-7"]
    assert "must be complete" in (folder / "data/reports/validation/index.html").read_text()
    project(own, partial=["own"], tolerance={"raw": 0, "generated": 0})
    validate()
    assert list(pd.read_parquet(folder / "data/quarantine.parquet")["pair_id"]) == ["own-test-7"]


def test_a_leak_in_generated_data_is_refused_but_a_leak_in_raw_data_is_accepted(project: Project) -> None:
    """Run the stage `validate`, which accepts leaks in raw data because the stage `build` removes them."""
    own, generated = records("own"), records("edits")
    project(change(own, "own-train-1", after=own[-1].before), generated)
    probe()
    validate()
    project(own, change(generated, "edits-train-1", after=generated[-1].before))
    probe()
    with pytest.raises(ValueError, match=r"^2 pairs: an image occurs in two splits \(first: edits-test-10\); see"):
        validate()


def test_raw_and_generated_pairs_have_separate_tolerances(project: Project) -> None:
    own = change(records("own"), "own-train-1", references=[])
    project(own, records("edits"), tolerance={"raw": 0.01, "generated": 1.0})
    probe()
    with pytest.raises(ValueError, match=r"1 of 44 raw pairs are bad \(2\.27%, tolerance 1\.00%"):
        validate()


def test_general_instruction_data_is_accepted(project: Project) -> None:
    own = records("own")
    own[0] = replace(own[0], after=b"", num_images=1, references=["A long answer.\n" * 200], change_type="general")
    own[1] = replace(own[1], before=b"", after=b"", num_images=0, change_type="general")
    folder = project(own)
    probe()
    validate()
    assert pd.read_parquet(folder / "data/quarantine.parquet").empty
    assert list(pd.read_parquet(folder / "data/probe.parquet")["num_images"].value_counts()) == [42, 1, 1]


def test_two_runs_on_equal_data_write_equal_files(project: Project) -> None:
    folder = project(change(records("own"), "own-val-4", references=[" "]), records("edits"))
    files = []
    for _ in range(2):
        probe()
        validate()
        files.append([path.read_bytes() for path in sorted((folder / "data").rglob("*"))
                      if path.name in ("probe.parquet", "quarantine.parquet", "index.html")])
    assert len(files[0]) == 3
    assert files[0] == files[1]


def test_pairs_of_real_photographs_are_accepted(project: Project) -> None:
    if not PHOTOS.is_dir():
        pytest.skip(f"the folder {PHOTOS} does not exist")
    own = records("own")
    photos = [*sorted(PHOTOS.glob("natural_*[1A].*g")), *sorted(PHOTOS.glob("whatsup_*_before.*"))]
    for number, before in enumerate(photos):
        # The two images of such a pair have different sizes, as in some published datasets.
        own[number] = replace(own[number], before=before.read_bytes())
    folder = project(own)
    probe()
    validate()
    assert pd.read_parquet(folder / "data/quarantine.parquet").empty


def test_the_errors_for_missing_and_truncated_files_contain_their_paths(project: Project) -> None:
    folder = project(records("own"))
    with pytest.raises(FileNotFoundError, match=r"data/probe\.parquet does not exist; 'dvc repro probe' writes it"):
        validate()
    path = folder / "data/pairs/own/test-00000.parquet"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"^data/pairs/own/test-00000\.parquet: not a complete Parquet file"):
        probe()
    (folder / "data/pairs/own").rename(folder / "data/pairs/moved")
    with pytest.raises(FileNotFoundError, match=r"data/pairs/own/\*\.parquet does not exist"):
        probe()
