"""Stage `build`: the DiffCap shards and their card."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from onediff.config import SPLITS, load_params
from onediff.data.build import card, check_leaks, good_records, good_rows
from onediff.data.record import Record, read_records, write_shards
from onediff.data.shortcut import pixel_difference_auc
from onediff.stages import run
from onediff.stages.probe import SYNTHETIC, TABLE
from onediff.stages.validate import QUARANTINE

DIFFCAP = Path("data/diffcap")
AUC_TRAIN_PAIRS = 3000


def build() -> None:
    """Reads data/synthetic, the probe table and the quarantine; writes data/diffcap/. ValueError if a split leaks."""
    config = load_params()
    table, bad = pd.read_parquet(TABLE), pd.read_parquet(QUARANTINE)
    quarantined = frozenset(bad["pair_id"])
    rows = good_rows(table, quarantined=quarantined)
    check_leaks(rows)
    shutil.rmtree(DIFFCAP, ignore_errors=True)
    folders = [SYNTHETIC / source for source in config.data.sources]
    for split in SPLITS:
        records = tqdm(good_records(folders, split, quarantined=quarantined), total=int((rows["split"] == split).sum()),
                       desc=f"build {split}", unit="pair")
        write_shards(records, DIFFCAP, split, shard_pairs=config.data.shard_pairs)
    auc = {source: _auc(source) for source in ("scenes", "scenes_far") if (rows["source"] == source).any()}
    text = json.dumps(card(rows, DIFFCAP, num_quarantined=len(bad), auc=auc), indent=2, sort_keys=True)
    (DIFFCAP / "card.json").write_text(text + "\n", encoding="utf-8")


def _auc(source: str) -> float | None:
    train = itertools.islice(_of("train", "scenes"), AUC_TRAIN_PAIRS)
    return pixel_difference_auc(train, _of("test", source))


def _of(split: str, source: str) -> Iterator[Record]:
    return (record for record in read_records(DIFFCAP, f"{split}-*.parquet") if record.source == source)


if __name__ == "__main__":
    run(build)
