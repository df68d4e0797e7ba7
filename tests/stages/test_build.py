"""Tests of the stage `build`, which merges the shards of all sources into DiffCap and removes leaked pairs.

The project has two sources: `mine` contains pairs, and `talk` contains general instruction data with one image or none.
"""

from __future__ import annotations

import io
import json
import resource
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from ruamel.yaml import YAML

from onediff.data.record import SPLITS, Record, read_records, write_shards
from onediff.stages.build import build
from onediff.stages.probe import probe
from onediff.stages.validate import validate

ROOT = Path(__file__).parents[2]
PER_SPLIT = 7


def random_image(seed: int) -> Image.Image:
    cells = np.random.default_rng(seed).integers(30, 220, size=(7, 11, 3)).astype(np.uint8)
    return Image.fromarray(cells).resize((111, 77), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def records(source: str, start: int) -> dict[str, Record]:
    """Return seven records of each split by pair id; `start` is the seed of the first image."""
    result = {}
    for split in SPLITS:
        for k in range(PER_SPLIT):
            number = start + 100 * SPLITS.index(split) + k
            provenance = {"names": [f"{number}.png", f"{number}_2.png"], "official_split": split}
            pair_id = f"{source}-{split}-{k}"
            result[pair_id] = Record(
                pair_id, source, split, f"{source}-{number}", encoded(random_image(2 * number)),
                encoded(random_image(2 * number + 1)), [f"the cup number {k} was moved away"], "What changed?",
                "unlabelled", provenance)
    return result


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create a project in which three pairs of the source `mine` leak into a later split, each in another way."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ONEDIFF_WORKERS", "1")
    mine = records("mine", 0)
    # This is a near-duplicate of the before image of mine-test-0.
    near_duplicate = random_image(2 * 300).resize((333, 231), Image.Resampling.LANCZOS)
    changes: dict[str, dict[str, Any]] = {
        "mine-train-1": {"after": encoded(near_duplicate, "JPEG", quality=80)},
        "mine-train-2": {"before": encoded(random_image(2 * 302), "BMP")},
        "mine-val-3": {"provenance": mine["mine-test-4"].provenance | {"official_split": "val"}},
    }
    mine |= {name: Record(**vars(mine[name]) | values) for name, values in changes.items()}
    save("mine", list(mine.values()))
    talk = [Record(**vars(record) | {"num_images": k % 2, "after": b"", "before": record.before if k % 2 else b"",
                                     "change_type": "general", "provenance": {"official_split": "train"}})
            for k, record in enumerate(records("talk", 5000).values()) if record.split == "train"]
    save("talk", talk)
    save_params()
    return tmp_path


def save(source: str, records: list[Record]) -> None:
    for split in SPLITS:
        write_shards([record for record in records if record.split == split], Path("data/pairs") / source, split,
                     shard_pairs=5)


def save_params(**leaks: Any) -> None:
    values = YAML(typ="safe").load((ROOT / "presets/tiny.yaml").read_text())
    values["data"] |= {"generated": [], "raw": ["mine", "talk"], "shard_pairs": 5}
    values["data"]["leaks"] = {"action": "drop", "near_bits": 3, "max_distance": {"mine": 4.0}} | leaks
    values["align"]["mixture"] = values["tune"]["mixture"] = {"mine": 1}
    YAML().dump(values, Path("params.yaml"))


def run_all() -> None:
    probe()
    validate()
    build()


def test_a_leaked_pair_is_removed_from_the_earlier_split_and_listed_in_the_report(folder: Path) -> None:
    report = {"splits": {"test": {"records": 7, "expected": {"records": 9}, "complete": False}}}
    (folder / "data/pairs/mine/report.json").write_text(json.dumps(report))
    run_all()
    remaining = {record.pair_id for record in read_records(folder / "data/diffcap")}
    removed = {"mine-train-1": "near-duplicate image", "mine-train-2": "equal image",
               "mine-val-3": "equal published names"}
    assert remaining == {*records("mine", 0), *(f"talk-train-{k}" for k in range(PER_SPLIT))} - set(removed)
    leaks = pd.read_parquet(folder / "data/reports/diffcap/leaks.parquet")
    assert leaks["leaks"].all()
    assert dict(zip(leaks["pair_id"], leaks["reason"], strict=True)) == removed
    assert list(leaks.sort_values("pair_id")["partner"]) == ["mine-test-0", "mine-test-2", "mine-test-4"]
    card = json.loads((folder / "data/diffcap/card.json").read_text())
    assert card["leaks"]["shared_published_names"]["mine"] == {"test-val": 1, "train-val": 0, "train-test": 0}
    assert (card["leaks"]["num_dropped"], card["leaks"]["images"], card["num_quarantined"]) == (3, 0, 0)
    assert card["incomplete"]["mine"] == {"test_pairs": 7, "listed_test_pairs": 7, "published": {"records": 9},
                                          "read": {"records": 7}}
    assert "| mine | 7 | 7 |" in (folder / "data/diffcap/README.md").read_text()
    assert (folder / "data/reports/diffcap/index.html").exists()


def test_the_audit_contains_a_verdict_on_each_benchmark(folder: Path) -> None:
    run_all()
    audit = json.loads((folder / "data/reports/diffcap/audit.json").read_text())["benchmarks"]
    assert audit == {"mine": {"num_pairs": 7, "equal_image": 0, "equal_caption": 7, "rare_caption": 0,
                              "near_caption": 0, "leaks": 0, "dropped": 2, "lookalikes": 0, "nearest": None,
                              "verdict": "clean"}}
    caption = "the porter put a second brown suitcase on the lower shelf"
    mine = {record.pair_id: record for record in read_records(folder / "data/pairs/mine")}
    for name, text in (("mine-test-5", caption), ("mine-train-6", f"{caption} of the cart")):
        mine[name] = Record(**vars(mine[name]) | {"references": [text]})
    save("mine", list(mine.values()))
    run_all()
    audit = json.loads((folder / "data/reports/diffcap/audit.json").read_text())["benchmarks"]["mine"]
    assert (audit["near_caption"], audit["leaks"], audit["verdict"]) == (1, 1, "1 of 7 test pairs leak")


def test_the_library_datasets_reads_the_shards_and_decodes_the_images(folder: Path) -> None:
    import datasets

    run_all()
    datasets.disable_progress_bars()
    cache = str(folder / "cache")
    files = {split: str(folder / f"data/diffcap/{split}-*.parquet") for split in SPLITS}
    by_files = datasets.load_dataset("parquet", data_files=files, cache_dir=cache)
    by_card = datasets.load_dataset(str(folder / "data/diffcap"), cache_dir=cache)
    for pairs in (by_files, by_card):
        assert {split: len(part) for split, part in pairs.items()} == {"train": 12, "val": 6, "gate": 7, "test": 7}
        for row, record in zip(pairs["test"], read_records(folder / "data/diffcap", "test-*.parquet"), strict=True):
            assert row["pair_id"] == record.pair_id and row["references"] == record.references
            with Image.open(io.BytesIO(record.after)) as image:
                assert np.array_equal(np.asarray(row["after"]), np.asarray(image))
        talk = [row for row in pairs["train"] if row["source"] == "talk"]
        assert [row["num_images"] for row in talk] == [0, 1, 0, 1, 0, 1, 0]
        assert all(row["after"] is None and (row["before"] is not None) == row["num_images"] for row in talk)


def test_with_action_stop_a_leak_stops_the_stage_after_the_list_of_leaks_is_written(folder: Path) -> None:
    save_params(action="stop")
    message = r"3 pairs also occur in a later split \(first: mine-train-2 in train and mine-test-2 in test: equal im"
    with pytest.raises(ValueError, match=message):
        run_all()
    assert len(pd.read_parquet(folder / "data/reports/diffcap/leaks.parquet")) == 3
    assert not (folder / "data/diffcap").exists()


def test_near_duplicates_of_a_source_without_a_maximal_distance_are_reported_but_kept(folder: Path) -> None:
    save_params(max_distance={"mine": None})
    run_all()
    leaks = pd.read_parquet(folder / "data/reports/diffcap/leaks.parquet").set_index("pair_id")
    assert not leaks.loc["mine-train-1", "leaks"]
    assert 0 < leaks.loc["mine-train-1", "distance"] < 4
    assert "mine-train-1" in {record.pair_id for record in read_records(folder / "data/diffcap")}


def test_near_duplicates_are_measured_even_if_max_distance_does_not_list_the_source(
        folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_params(max_distance={})
    run_all()
    leaks = pd.read_parquet(folder / "data/reports/diffcap/leaks.parquet").set_index("pair_id")
    assert 0 < leaks.loc["mine-train-1", "distance"] < 4
    assert "1 pairs look like a pair of a later split and are kept" in capsys.readouterr().out


def test_on_a_full_disk_the_old_shards_are_kept_and_no_partial_file_remains(folder: Path) -> None:
    run_all()
    before = {path.name: path.read_bytes() for path in (folder / "data/diffcap").iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # A shard is larger than this limit on the file size.
    try:
        with pytest.raises(OSError, match=r"data/diffcap.* could not be written: the file is larger than the limit"):
            build()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name: path.read_bytes() for path in (folder / "data/diffcap").iterdir()} == before
    assert not list((folder / "data").glob("*.part"))


def test_shards_changed_after_the_probe_are_refused(folder: Path) -> None:
    run_all()
    save("mine", list(records("other", 700).values()))
    with pytest.raises(ValueError, match=r"data/pairs/mine/.*parquet: this shard changed after data/probe\.parquet"):
        build()


def test_a_missing_probe_is_refused(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data/probe\.parquet does not exist; 'dvc repro validate' writes it"):
        build()


def test_the_card_contains_the_names_of_the_diffusion_model_and_of_the_caption_writer(folder: Path) -> None:
    probe()
    validate()
    shutil.copytree("data/pairs/talk", "data/written/talk")
    values = YAML(typ="safe").load(Path("params.yaml").read_text())
    similarities = {f"min_{name}_similarity": 0.2 for name in ("image", "caption", "direction")}
    values["data"] |= {
        "raw": ["mine"], "diffused": ["talk"], "written": ["talk"], "clip": "clip",
        "diffusion": {"pipeline": "some/editor", "image_px": 64, "steps": 2, "guidance": 7.5, "image_guidance": 1.5,
                      "num_samples": 1, **similarities},
        "writer": {"model": "some-writer", "mode": "text", "prompts": "v1", "temperature": 0.5, "max_tokens": 9}}
    YAML().dump(values, Path("params.yaml"))
    build()
    source = json.loads((folder / "data/diffcap/card.json").read_text())["sources"]["talk"]
    assert source["what"] == "images edited by some/editor"
    assert source["captions"] == "written by some-writer (text, prompts v1)"
