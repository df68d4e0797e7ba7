"""Good records -> DiffCap: which pairs go in, whether a split leaks into another, and the card that tells of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from onediff.config import SPLITS
from onediff.data.probe import read_raw
from onediff.data.record import Record, digest

NEAR_BITS = 3  # of 64 bits of a perceptual hash


def good_records(folders: list[Path], split: str, *, quarantined: frozenset[str]) -> Iterator[Record]:
    """The split's records in the order of the folders and their shards, without the quarantined."""
    for folder in folders:
        for record in read_raw(folder):
            if record.split == split and record.pair_id not in quarantined:
                yield record


def good_rows(table: pd.DataFrame, *, quarantined: frozenset[str]) -> pd.DataFrame:
    return table[~table["pair_id"].isin(list(quarantined)) & table["split"].isin(SPLITS)]


def check_leaks(table: pd.DataFrame) -> None:
    """Raises ValueError if a decoded image or a group_id occurs in two splits of the probe table."""
    images = pd.concat(
        [table[["split", f"hash_{side}"]].rename(columns={f"hash_{side}": "value"}) for side in ("before", "after")]
    )
    for what, seen in (
        ("images", images),
        ("groups", table[["split", "group_id"]].rename(columns={"group_id": "value"})),
    ):
        pairs = seen.drop_duplicates()
        shared = pairs[pairs["value"].duplicated(keep=False)].sort_values("value")
        if len(shared):
            first = shared["value"].iloc[0]
            where = " and ".join(sorted(shared.loc[shared["value"] == first, "split"]))
            raise ValueError(
                f"data/diffcap: {shared['value'].nunique()} {what} occur in two splits (first: {first} in {where}); "
                "see data/reports/validation/index.html"
            )


def near_duplicates(table: pd.DataFrame) -> dict[str, dict[str, int]]:
    """Per source and split: images whose perceptual hash is at most NEAR_BITS from a train image of any source.

    Only candidates: neighbours are natural where scenes are rendered, so nothing stops because of them.
    """
    train = _hashes(table[table["split"] == "train"])
    found: dict[str, dict[str, int]] = {}
    for key, rows in table[table["split"] != "train"].groupby(["source", "split"]):
        source, split = cast(tuple[str, str], key)
        found.setdefault(source, {})[split] = _num_near(_hashes(rows), train)
    return found


def _hashes(rows: pd.DataFrame) -> NDArray[np.uint64]:
    images = pd.concat(
        [rows[[f"hash_{side}", f"phash_{side}"]].set_axis(["hash", "phash"], axis=1) for side in ("before", "after")]
    )
    return images.drop_duplicates("hash")["phash"].to_numpy(dtype=np.uint64)


def _num_near(hashes: NDArray[np.uint64], train: NDArray[np.uint64]) -> int:
    if not len(train):
        return 0
    return sum(int(np.bitwise_count(train ^ value).min()) <= NEAR_BITS for value in hashes)


def card(table: pd.DataFrame, folder: Path, *, num_quarantined: int, auc: dict[str, float | None]) -> dict[str, Any]:
    """What card.json says about the shards in `folder`; `table` holds the good rows, after `check_leaks`."""
    counts: dict[str, dict[str, dict[str, int]]] = {split: {} for split in SPLITS}
    for key, count in table.groupby(["split", "source", "change_type"]).size().items():
        split, source, change = cast(tuple[str, str, str], key)
        counts[split].setdefault(source, {})[change] = int(count)
    return {
        "num_pairs": counts, "num_quarantined": num_quarantined,
        "leaks": {"images": 0, "groups": 0, "near_train_images": near_duplicates(table), "near_bits": NEAR_BITS},
        "pixel_difference_auc": auc,
        "digests": {path.name: digest(path.read_bytes()) for path in sorted(folder.glob("*.parquet"))},
    }
