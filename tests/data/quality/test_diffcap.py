from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from onediff.config import Config
from onediff.data.quality.diffcap import (
    card,
    chosen_tables,
    dataset_card,
    good_rows,
    incomplete_tests,
    leak_card,
    num_shared,
    origin,
    staying,
)
from onediff.data.quality.leaks import COLUMNS
from onediff.data.record import SPLITS, Record, digest, write_shards, write_tables


def record(number: int, split: str, source: str = "edits") -> Record:
    """Return a record of two images or, for one of seven numbers, a general record of one image."""
    is_single = number % 7 == 3
    return Record(f"{source}-{split}-{number}", source, split, f"g{number}", b"before%d" % number,
                  b"" if is_single else b"after%d" % number, ["a", "b"], "?", "general" if is_single else "blur",
                  {"n": number}, num_images=1 if is_single else 2)


def probed(records: list[Record]) -> pd.DataFrame:
    """Return the columns of the probe table that the stage `build` reads."""
    return pd.DataFrame([{
        "pair_id": record.pair_id, "source": record.source, "split": record.split, "change_type": record.change_type,
        "group_id": record.group_id, "num_references": len(record.references), "hash_before": digest(record.before),
        "hash_after": digest(record.after) if record.after else ""} for record in records])


@pytest.fixture
def written(tmp_path: Path) -> tuple[list[Path], list[Record]]:
    """Write shards of two sources, and return their folders and the records in the order of the shards."""
    records = []
    for source in ("scenes", "edits"):
        for split in sorted(SPLITS):
            part = [record(k, split, source) for k in range(151 if split == "train" else 11)]
            write_shards(part, tmp_path / source, split, shard_pairs=83)
            records += part
    return [tmp_path / "scenes", tmp_path / "edits"], records


def test_copying_all_tables_gives_the_bytes_of_writing_all_records(written: tuple[list[Path], list[Record]],
                                                                   tmp_path: Path) -> None:
    folders, records = written
    rows = probed(records)
    for split in SPLITS:
        (tmp_path / "copy").mkdir(exist_ok=True)
        count = write_tables(chosen_tables(folders, rows, split), tmp_path / "copy", split, shard_pairs=151)
        in_split = (record for record in records if record.split == split)
        assert count == write_shards(in_split, tmp_path / "direct", split, shard_pairs=151)
    files = sorted((tmp_path / "direct").iterdir())
    assert [path.name for path in files] == [path.name for path in sorted((tmp_path / "copy").iterdir())]
    assert len(files) == 5
    assert all(path.read_bytes() == (tmp_path / "copy" / path.name).read_bytes() for path in files)


def test_good_pairs_keep_their_order_and_quarantined_pairs_are_omitted(
        written: tuple[list[Path], list[Record]]) -> None:
    folders, records = written
    table = probed(records)
    table.loc[9, "split"] = "dev"
    rows = good_rows(table, quarantined=frozenset({"scenes-train-3", "edits-train-70"}))
    names = [name for part in chosen_tables(folders, rows, "train") for name in part.column("pair_id").to_pylist()]
    assert names == [record.pair_id for record in records
                     if record.split == "train" and record.pair_id not in ("scenes-train-3", "edits-train-70")]
    assert len(rows) == len(records) - 3


def test_shards_that_changed_after_the_probe_are_refused(written: tuple[list[Path], list[Record]]) -> None:
    folders, records = written
    table = probed(records)
    table.loc[30, "pair_id"] = "another"
    with pytest.raises(ValueError, match=r"parquet: this shard changed after data/probe\.parquet was written; run"):
        list(chosen_tables(folders, table, str(table.loc[30, "split"])))


def leaking(*pairs: tuple[str, str, str]) -> pd.DataFrame:
    """Return a table of leaks with the pair id, the split and the reason of each leak."""
    lines = [{"pair_id": pair, "source": "edits", "split": split, "reason": reason, "partner": "p",
              "partner_source": "x", "partner_split": "test", "distance": np.nan,
              "leaks": reason != "near-duplicate image"}
             for pair, split, reason in pairs]
    return pd.DataFrame(lines, columns=list(COLUMNS)).astype(COLUMNS)


def test_leaking_pairs_are_removed_and_pairs_that_are_only_reported_are_kept() -> None:
    rows = pd.DataFrame([{"pair_id": f"p{k}", "source": "edits", "split": SPLITS[k % 4], "group_id": f"g{k}",
                          "hash_before": f"b{k}", "hash_after": ""} for k in range(11)])
    leaks = leaking(("p0", "train", "equal image"), ("p0", "train", "equal group"),
                    ("p4", "train", "near-duplicate image"))
    remaining = staying(rows, leaks)
    assert list(remaining["pair_id"]) == [f"p{k}" for k in range(1, 11)]
    values = leak_card(remaining, leaks, near_bits=3, near_train={}, names={})
    assert (values["num_dropped"], values["num_reported"], values["images"], values["groups"]) == (1, 1, 0, 0)
    assert values["dropped"] == {"train": {"edits": {"equal image": 1}}}
    every_gate = leaking(*((f"p{k}", "gate", "equal image") for k in (2, 6, 10)))
    with pytest.raises(ValueError, match=r"data/diffcap: no pair is left in split gate"):
        staying(rows, every_gate)


def test_an_image_that_occurs_in_two_splits_is_counted_once() -> None:
    rows = pd.DataFrame({"split": ["train", "test", "val", "val"], "hash_before": ["x", "x", "x", ""],
                         "hash_after": ["y", "z", "", ""]})
    assert num_shared(rows, "hash_before", "hash_after") == 1


def test_the_card_contains_counts_of_pairs_and_digests_of_shards(tmp_path: Path, micro: Config) -> None:
    write_shards([record(0, "train")], tmp_path, "train", shard_pairs=5)
    rows = pd.DataFrame([{"pair_id": f"p{k}", "source": ("edits", "spot_the_diff")[k % 2], "split": SPLITS[k % 4],
                          "change_type": "blur", "num_references": 3} for k in range(44)])
    values = card(rows, tmp_path, micro.data)
    assert values["num_pairs"]["train"] == {"edits": {"blur": 11}}
    assert values["num_pairs"]["test"] == {"spot_the_diff": {"blur": 11}}
    assert values["digests"] == {"train-00000.parquet": digest((tmp_path / "train-00000.parquet").read_bytes())}
    assert values["num_references"] == 132
    assert values["sources"]["spot_the_diff"]["licence"] == "none stated"
    assert json.loads(json.dumps(values)) == values


def test_the_card_contains_a_description_a_licence_and_a_home_page_of_every_source(micro: Config) -> None:
    sources = {"raw": ["mine", "clevr_change"], "retrieved": ["coco"], "diffused": ["flickr"]}
    data = micro.data.model_copy(update=sources)
    names = ("scenes", "scenes_far", "edits", *data.raw, "coco", "flickr")
    origins = {source: origin(source, data) for source in names}
    assert all(set(facts) >= {"what", "licence", "home"} for facts in origins.values())
    assert (origins["scenes"]["licence"], origins["mine"]["home"]) == ("Apache-2.0", "data/raw/mine")
    assert "data/raw/coco" in origins["coco"]["licence"]


def test_a_test_split_that_lacks_pairs_is_listed_as_incomplete() -> None:
    rows = pd.DataFrame({"source": ["a"] * 7 + ["b"] * 5 + ["c"] * 3, "split": "test"})
    test = {"records": 9, "pairs": 7, "references": 20, "expected": {"records": 9, "pairs": 8}, "complete": False}
    reports = {"a": {"splits": {"test": {"complete": True}}}, "b": {"splits": {"test": test}},
               "c": {"splits": {"test": {"complete": True, "expected": None}}}}
    assert incomplete_tests(rows, rows.iloc[:-1], reports) == {
        "b": {"test_pairs": 5, "listed_test_pairs": 5, "published": {"records": 9, "pairs": 8},
              "read": {"records": 9, "pairs": 7}},
        "c": {"test_pairs": 2, "listed_test_pairs": 3}}


def test_a_gate_split_that_lacks_pairs_is_listed_as_incomplete() -> None:
    rows = pd.DataFrame({"source": "a", "split": ["test"] * 3 + ["gate"] * 5})
    assert incomplete_tests(rows, rows.iloc[:-2], {"a": {"splits": {"test": {"complete": True}}}}) == {
        "a": {"test_pairs": 3, "listed_test_pairs": 3, "gate_pairs": 3, "listed_gate_pairs": 5}}


def test_the_readme_of_diffcap_contains_the_numbers_of_card_json(tmp_path: Path, micro: Config) -> None:
    from ruamel.yaml import YAML

    rows = pd.DataFrame([{"pair_id": f"p{k}", "source": "scenes", "split": SPLITS[k % 4], "change_type": "none",
                          "group_id": f"g{k}", "hash_before": "", "hash_after": "", "num_references": 3}
                         for k in range(4444)])
    names = {"image_editing_request": {"test-val": 55, "train-val": 2, "train-test": 1}}
    values = leak_card(rows, leaking(("p", "train", "equal image")), near_bits=3, near_train={}, names=names)
    values = card(rows, tmp_path, micro.data) | {
        "leaks": values, "num_quarantined": 17, "pixel_difference_auc": {},
        "incomplete": {"spot_the_diff": {"test_pairs": 1200, "listed_test_pairs": 1270}}}
    page = dataset_card(values)
    head, body = page.split("---\n", 2)[1:]
    assert YAML(typ="safe").load(head)["configs"][0]["data_files"][3] == {"split": "test", "path": "test-*.parquet"}
    assert YAML(typ="safe").load(head)["license"] == "apache-2.0"
    for line in ("4,444 records", "| scenes | 1,111 | 1,111 | 1,111 | 1,111 |", "| train | edits | equal image | 1 |",
                 "| image_editing_request | 55 | 2 | 1 |", "| spot_the_diff | 1,200 | 1,270 |", "17 bad pairs"):
        assert line in body
