"""Good records -> DiffCap: shards of what quarantine and leak check left, and the card that tells of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from jinja2 import Environment, StrictUndefined

from onediff.config import Data
from onediff.data.quality.probe import row_groups
from onediff.data.record import ROW_GROUP, SCHEMA, SPLITS, digest
from onediff.data.sources.catalog import CATALOG

LICENCE = "Apache-2.0"  # this project's, and so that of what it draws


def good_rows(table: pd.DataFrame, *, quarantined: frozenset[str]) -> pd.DataFrame:
    """The rows that may be used, each labelled with its place in the probe table, which is its place in the shards."""
    rows = table.reset_index(drop=True)
    return rows[~rows["pair_id"].isin(list(quarantined)) & rows["split"].isin(SPLITS)]


def staying(rows: pd.DataFrame, leaks: pd.DataFrame) -> pd.DataFrame:
    """The rows without those that leak. Raises ValueError if a split ends up empty."""
    rows = rows[~rows["pair_id"].isin(leaks.loc[leaks["leaks"], "pair_id"])]
    for split in SPLITS:
        if not (rows["split"] == split).any():
            raise ValueError(f"data/diffcap: no pair is left in split {split}; each of {', '.join(SPLITS)} needs some: "
                             "see data/quarantine.parquet and data/reports/diffcap/leaks.parquet")
    return rows


# --- shards -----------------------------------------------------------------------------------------------------------


def chosen_tables(folders: list[Path], rows: pd.DataFrame, split: str) -> Iterator[pa.Table]:
    """The split's records as Arrow tables, in the order of the folders and their shards, a row group at a time.

    Raises ValueError if the shards are not those that the probe table is of.
    """
    rows = rows[rows["split"] == split]
    places, names = rows.index.to_numpy(), rows["pair_id"].to_numpy()
    for path, group, start, end in row_groups(folders):
        low, high = np.searchsorted(places, [start, end])
        if low < high:
            table = pq.ParquetFile(path).read_row_group(group).take(places[low:high] - start)
            if table.column("pair_id").to_pylist() != list(names[low:high]):
                raise ValueError(f"{path}: changed since data/probe.parquet was made; 'dvc repro' makes it anew")
            yield table.select(SCHEMA.names).cast(SCHEMA)


def write_tables(tables: Iterable[pa.Table], folder: Path, prefix: str, *, shard_pairs: int) -> int:
    """The same files as record.write_shards, a row group in memory at a time; returns the number of pairs."""
    sizes = [ROW_GROUP] * (shard_pairs // ROW_GROUP) + [shard_pairs % ROW_GROUP] * (shard_pairs % ROW_GROUP > 0)
    parts, total = _in_sizes(tables, itertools.cycle(sizes)), 0
    for shard in itertools.count():
        first = next(parts, None)
        if first is None:
            return total
        with pq.ParquetWriter(folder / f"{prefix}-{shard:05d}.parquet", SCHEMA, compression="zstd") as writer:
            for part in itertools.chain([first], itertools.islice(parts, len(sizes) - 1)):
                writer.write_table(part)
                total += len(part)
    raise AssertionError("unreachable")


def _in_sizes(tables: Iterable[pa.Table], sizes: Iterator[int]) -> Iterator[pa.Table]:
    waiting, size = SCHEMA.empty_table(), next(sizes)
    for table in tables:
        waiting = pa.concat_tables([waiting, table])
        while len(waiting) >= size:
            yield waiting.slice(0, size).combine_chunks()
            waiting, size = waiting.slice(size), next(sizes)
    if len(waiting):
        yield waiting.combine_chunks()


# --- the card ---------------------------------------------------------------------------------------------------------


def card(rows: pd.DataFrame, folder: Path, *, data: Data, leaks: Mapping[str, Any],
         incomplete: Mapping[str, Any], auc: Mapping[str, float | None]) -> dict[str, Any]:
    """What card.json says about the shards in `folder`; `rows` are those of the pairs in them."""
    counts: dict[str, dict[str, dict[str, int]]] = {split: {} for split in SPLITS}
    for key, count in rows.groupby(["split", "source", "change_type"]).size().items():
        split, source, change = cast(tuple[str, str, str], key)
        counts[split].setdefault(source, {})[change] = int(count)
    return {
        "num_pairs": counts, "num_references": int(rows["num_references"].sum()),
        "sources": {str(source): origin(str(source), data) for source in sorted(rows["source"].unique())},
        "leaks": dict(leaks), "incomplete": dict(incomplete), "pixel_difference_auc": dict(auc),
        "digests": {path.name: digest(path.read_bytes()) for path in sorted(folder.glob("*.parquet"))},
    }


def leak_card(rows: pd.DataFrame, leaks: pd.DataFrame, *, near_bits: int, near_train: Mapping[str, Any],
              names: Mapping[str, Any]) -> dict[str, Any]:
    """What the card says of leaks; `rows` is what stayed, so that the zeros are counted, not claimed."""
    dropped: dict[str, dict[str, dict[str, int]]] = {}
    gone = leaks[leaks["leaks"]].drop_duplicates("pair_id")
    for key, count in gone.groupby(["split", "source", "reason"]).size().items():
        split, source, reason = cast(tuple[str, str, str], key)
        dropped.setdefault(split, {}).setdefault(source, {})[reason] = int(count)
    only_reported = leaks[~leaks["leaks"]]["pair_id"].nunique()
    return {"images": num_shared(rows, "hash_before", "hash_after"), "groups": num_shared(rows, "group_id"),
            "dropped": dropped, "num_dropped": len(gone), "num_reported": int(only_reported),
            "near_train_images": dict(near_train), "near_bits": near_bits, "shared_published_names": dict(names)}


def num_shared(rows: pd.DataFrame, *columns: str) -> int:
    """How many values of the columns occur in more than one split."""
    seen = pd.concat([rows[["split", name]].set_axis(["split", "value"], axis=1) for name in columns])
    seen = seen[seen["value"] != ""].drop_duplicates()
    return int(seen.loc[seen["value"].duplicated(), "value"].nunique())


def origin(source: str, data: Data) -> dict[str, str]:
    """What a source is, its licence and its home."""
    if source in CATALOG:
        entry = CATALOG[source]
        told = {"what": entry.what, "licence": entry.licence, "home": entry.home}
    elif source in data.raw:
        told = {"what": "pairs of your own", "licence": "your own", "home": f"data/raw/{source}"}
    elif source in data.retrieved:
        told = {"what": "neighbours found in a collection of captioned images",
                "licence": f"that of the images in data/raw/{source}", "home": f"data/raw/{source}"}
    elif source in data.diffused:
        told = {"what": f"images edited by {data.diffusion.pipeline if data.diffusion else 'a diffusion model'}",
                "licence": f"that of the images in data/raw/{source} and of the pipeline", "home": f"data/raw/{source}"}
    elif source == "edits":
        told = {"what": "photographs and drawn canvases edited by program, from a seed",
                "licence": f"{LICENCE}; each photograph its own (scikit-image, scikit-learn, or data.edits.photos)",
                "home": "onediff/data/synthesis"}
    else:
        told = {"what": "rendered from a seed", "licence": LICENCE, "home": "onediff/data/synthesis"}
    if source in data.written and data.writer is not None:
        told["captions"] = f"written by {data.writer.model} ({data.writer.mode}, prompts {data.writer.prompts})"
    return told


def incomplete_tests(probed: pd.DataFrame, rows: pd.DataFrame, reports: Mapping[str, Any]) -> dict[str, Any]:
    """Published sources whose test or gate is not whole: pairs in DiffCap, pairs listed, and what the reader reported.

    `probed`: every row of the probe table; `reports`: stage read's report.json by source.
    """
    found: dict[str, Any] = {}
    for source, report in reports.items():
        counts: dict[str, Any] = {}
        for split in ("test", "gate"):
            listed, present = (int(((part["split"] == split) & (part["source"] == source)).sum())
                               for part in (probed, rows))
            if split == "test" or present != listed:
                counts |= {f"{split}_pairs": present, f"listed_{split}_pairs": listed}
        test = report.get("splits", {}).get("test", {})
        if len(counts) == 2 and counts["test_pairs"] == counts["listed_test_pairs"] and test.get("complete", True):
            continue
        found[source] = counts
        if test.get("expected"):
            found[source] |= {"published": test["expected"],
                              "read": {name: test[name] for name in test["expected"] if name in test}}
    return found


def dataset_card(card: Mapping[str, Any]) -> str:
    """README.md of the shards, with the head by which `datasets.load_dataset(folder)` finds the splits."""
    pairs = card["num_pairs"]
    kinds = {(source, kind) for sources in pairs.values() for source, its in sources.items() for kind in its}
    licences = {told["licence"] for told in card["sources"].values()}
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["thousands"] = lambda count: f"{count:,}"
    template = environment.from_string(Path(__file__).with_name("card.md.j2").read_text(encoding="utf-8"))
    return template.render(
        card=card, splits=list(SPLITS), kinds=sorted(kinds),
        licence=LICENCE.lower() if licences == {LICENCE} else "other",
        size=sum(count for sources in pairs.values() for its in sources.values() for count in its.values())) + "\n"
