"""Pairs of one's own and general data, from their shards to DiffCap: what leaks leaves, and datasets reads the rest."""

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


def drawn(seed: int) -> Image.Image:
    cells = np.random.default_rng(seed).integers(30, 220, size=(7, 11, 3)).astype(np.uint8)
    return Image.fromarray(cells).resize((111, 77), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def records(source: str, start: int) -> dict[str, Record]:
    made = []
    for split in SPLITS:
        for k in range(PER_SPLIT):
            number = start + 100 * SPLITS.index(split) + k
            names = {"names": [f"{number}.png", f"{number}_2.png"], "official_split": split}
            made.append(Record(f"{source}-{split}-{k}", source, split, f"{source}-{number}", encoded(drawn(2 * number)),
                               encoded(drawn(2 * number + 1)), [f"the cup number {k} was moved away"], "What changed?",
                               "unlabelled", names))
    return {record.pair_id: record for record in made}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sources `mine`, which leaks in three ways, and `talk`, general data with one image or none."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ONEDIFF_WORKERS", "1")
    mine = records("mine", 0)
    again = drawn(2 * 300).resize((333, 231), Image.Resampling.LANCZOS)  # the before image of mine-test-0
    changes: dict[str, dict[str, Any]] = {
        "mine-train-1": {"after": encoded(again, "JPEG", quality=80)},
        "mine-train-2": {"before": encoded(drawn(2 * 302), "BMP")},
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


def save(source: str, made: list[Record]) -> None:
    for split in SPLITS:
        write_shards([record for record in made if record.split == split], Path("data/pairs") / source, split,
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


def test_leaks_leave_the_earlier_split_and_are_listed(folder: Path) -> None:
    report = {"splits": {"test": {"records": 7, "expected": {"records": 9}, "complete": False}}}
    (folder / "data/pairs/mine/report.json").write_text(json.dumps(report))
    run_all()
    left = {record.pair_id for record in read_records(folder / "data/diffcap")}
    gone = {"mine-train-1": "near-duplicate image", "mine-train-2": "equal image",
            "mine-val-3": "equal published names"}
    assert left == {*records("mine", 0), *(f"talk-train-{k}" for k in range(PER_SPLIT))} - set(gone)
    leaks = pd.read_parquet(folder / "data/reports/diffcap/leaks.parquet")
    assert leaks["leaks"].all()
    assert dict(zip(leaks["pair_id"], leaks["reason"], strict=True)) == gone
    assert list(leaks.sort_values("pair_id")["partner"]) == ["mine-test-0", "mine-test-2", "mine-test-4"]
    card = json.loads((folder / "data/diffcap/card.json").read_text())
    assert card["leaks"]["shared_published_names"]["mine"] == {"test-val": 1, "train-val": 0, "train-test": 0}
    assert (card["leaks"]["num_dropped"], card["leaks"]["images"], card["num_quarantined"]) == (3, 0, 0)
    assert card["incomplete"]["mine"] == {"test_pairs": 7, "listed_test_pairs": 7, "published": {"records": 9},
                                          "read": {"records": 7}}
    assert "| mine | 7 | 7 |" in (folder / "data/diffcap/README.md").read_text()
    assert (folder / "data/reports/diffcap/index.html").exists()


def test_the_verdict_on_each_test_benchmark_stands_beside_the_card(folder: Path) -> None:
    run_all()
    told = json.loads((folder / "data/reports/diffcap/audit.json").read_text())["benchmarks"]
    assert told == {"mine": {"num_pairs": 7, "equal_image": 0, "equal_caption": 7, "rare_caption": 0, "near_caption": 0,
                             "leaks": 0, "dropped": 2, "lookalikes": 0, "nearest": None, "verdict": "clean"}}
    said = "the porter put a second brown suitcase on the lower shelf"
    probed = {record.pair_id: record for record in read_records(folder / "data/pairs/mine")}
    for name, text in (("mine-test-5", said), ("mine-train-6", f"{said} of the cart")):
        probed[name] = Record(**vars(probed[name]) | {"references": [text]})
    save("mine", list(probed.values()))
    run_all()
    told = json.loads((folder / "data/reports/diffcap/audit.json").read_text())["benchmarks"]["mine"]
    assert (told["near_caption"], told["leaks"], told["verdict"]) == (1, 1, "1 of 7 test pairs leak")


def test_datasets_reads_the_shards_with_their_images(folder: Path) -> None:
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


def test_with_stop_a_leak_stops_after_the_list_is_written(folder: Path) -> None:
    save_params(action="stop")
    said = r"3 pairs also occur in a later split \(first: mine-train-2 in train and mine-test-2 in test: equal im"
    with pytest.raises(ValueError, match=said):
        run_all()
    assert len(pd.read_parquet(folder / "data/reports/diffcap/leaks.parquet")) == 3
    assert not (folder / "data/diffcap").exists()


def test_a_source_without_a_distance_only_reports_its_lookalikes(folder: Path) -> None:
    save_params(max_distance={"mine": None})
    run_all()
    leaks = pd.read_parquet(folder / "data/reports/diffcap/leaks.parquet").set_index("pair_id")
    assert not leaks.loc["mine-train-1", "leaks"]
    assert 0 < leaks.loc["mine-train-1", "distance"] < 4
    assert "mine-train-1" in {record.pair_id for record in read_records(folder / "data/diffcap")}


def test_pairs_of_ones_own_are_measured_without_being_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_params(max_distance={})
    run_all()
    leaks = pd.read_parquet(folder / "data/reports/diffcap/leaks.parquet").set_index("pair_id")
    assert 0 < leaks.loc["mine-train-1", "distance"] < 4
    assert "1 pairs look like a pair of a later split and are kept" in capsys.readouterr().out


def test_a_disk_that_is_full_leaves_the_old_shards_and_nothing_half_written(folder: Path) -> None:
    run_all()
    before = {path.name: path.read_bytes() for path in (folder / "data/diffcap").iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # no file may grow beyond, and the shards would
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
    with pytest.raises(ValueError, match=r"data/pairs/mine/.*parquet: changed since data/probe\.parquet was written"):
        build()


def test_what_is_missing_is_said(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data/probe\.parquet does not exist; 'dvc repro validate' writes it"):
        build()


def test_the_card_names_the_model_that_edited_images_and_the_writer(folder: Path) -> None:
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
    about = json.loads((folder / "data/diffcap/card.json").read_text())["sources"]["talk"]
    assert about["what"] == "images edited by some/editor"
    assert about["captions"] == "written by some-writer (text, prompts v1)"
