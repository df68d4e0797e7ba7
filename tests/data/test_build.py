from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from onediff.data.build import NEAR_BITS, card, check_leaks, good_records, good_rows, near_duplicates
from onediff.data.record import Record, digest, write_shards


def record(number: int, split: str, source: str = "edits") -> Record:
    return Record(
        f"{source}-{split}-{number}", source, split, f"g{number}", b"before", b"after", ["a"], "?", "blur", {}
    )


def table() -> pd.DataFrame:
    rng = np.random.default_rng(3)
    return pd.DataFrame(
        [
            {
                "pair_id": f"p{k}",
                "source": "edits",
                "split": ("train", "val", "gate", "test")[k % 4],
                "change_type": "blur",
                "group_id": f"g{k}",
                "hash_before": f"b{k}",
                "hash_after": f"a{k}",
                "phash_before": rng.integers(2**63),
                "phash_after": rng.integers(2**63),
            }
            for k in range(44)
        ]
    )


def test_good_records_come_in_order_without_the_quarantined(tmp_path: Path) -> None:
    for source in ("scenes", "edits"):
        for split in ("test", "train"):
            write_shards((record(k, split, source) for k in range(7)), tmp_path / source, split, shard_pairs=5)
    folders = [tmp_path / "scenes", tmp_path / "edits"]
    found = list(good_records(folders, "train", quarantined=frozenset({"scenes-train-3"})))
    assert found == [
        record(k, "train", source) for source in ("scenes", "edits") for k in range(7) if (source, k) != ("scenes", 3)
    ]


def test_good_rows_leave_out_the_quarantined_and_unknown_splits() -> None:
    rows = table()
    rows.loc[2, "split"] = "dev"
    assert list(good_rows(rows, quarantined=frozenset({"p0"}))["pair_id"]) == ["p1", *(f"p{k}" for k in range(3, 44))]


def test_leaks_are_refused_and_clean_splits_pass() -> None:
    rows = table()
    rows.loc[4, ["hash_before", "group_id"]] = ["a0", "g0"]  # both of split train
    check_leaks(rows)
    rows.loc[5, "hash_before"] = "a4"
    with pytest.raises(
        ValueError, match=r"data/diffcap: 1 images occur in two splits \(first: a4 in train and val\); see data/reports"
    ):
        check_leaks(rows)
    rows = table()
    rows.loc[[6, 7], "group_id"] = "g0"
    with pytest.raises(ValueError, match=r"1 groups occur in two splits \(first: g0 in gate and test and train\)"):
        check_leaks(rows)


def test_near_duplicates_equal_a_bit_by_bit_reference() -> None:
    rows = table()
    rows.loc[1, "phash_after"] = int(rows.loc[0, "phash_before"]) ^ 0b111
    rows.loc[2, "phash_before"] = int(rows.loc[0, "phash_before"]) ^ 0b1111
    rows.loc[7, ["phash_before", "phash_after"]] = [int(rows.loc[4, "phash_after"]) ^ 1] * 2
    slow = dict.fromkeys(("val", "gate", "test"), 0)
    train = [
        value
        for row in rows.to_dict("records")
        if row["split"] == "train"
        for value in (row["phash_before"], row["phash_after"])
    ]
    for row in rows.to_dict("records"):
        if row["split"] != "train":
            slow[row["split"]] += sum(
                any((int(row[f"phash_{side}"]) ^ int(other)).bit_count() <= NEAR_BITS for other in train)
                for side in ("before", "after")
            )
    assert near_duplicates(rows) == {"edits": slow} == {"edits": {"val": 1, "gate": 0, "test": 2}}


def test_the_card_counts_and_digests(tmp_path: Path) -> None:
    write_shards([record(0, "train")], tmp_path, "train", shard_pairs=5)
    said = card(table(), tmp_path, num_quarantined=2, auc={"scenes": 0.5})
    assert said["num_pairs"] == {split: {"edits": {"blur": 11}} for split in ("train", "val", "gate", "test")}
    assert said["digests"] == {"train-00000.parquet": digest((tmp_path / "train-00000.parquet").read_bytes())}
    assert (said["num_quarantined"], said["leaks"]["images"], said["pixel_difference_auc"]) == (2, 0, {"scenes": 0.5})
    assert json.loads(json.dumps(said)) == said
