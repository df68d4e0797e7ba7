"""Builds DiffCap from the records that passed validation and the leak check, and writes its dataset card."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
from jinja2 import Environment, StrictUndefined

from onediff.config import Data
from onediff.data.quality.leaks import nested_counts
from onediff.data.quality.probe import row_groups_with
from onediff.data.record import SCHEMA, SPLITS, digest, read_row_group
from onediff.data.sources.catalog import CATALOG

LICENCE = "Apache-2.0"  # the licence of this project and of the images that it renders


def good_rows(table: pd.DataFrame, *, quarantined: frozenset[str]) -> pd.DataFrame:
    """Return the rows of the probe table whose pairs are not quarantined and whose split is one of SPLITS.

    `quarantined` holds the pair_ids of bad pairs. The index of each row is the position of the record in all shards.
    """
    rows = table.reset_index(drop=True)
    return rows[~rows["pair_id"].isin(list(quarantined)) & rows["split"].isin(SPLITS)]


def staying(rows: pd.DataFrame, leaks: pd.DataFrame) -> pd.DataFrame:
    """Remove the leaking pairs from the rows of the probe table. Raises ValueError if a split would be empty.

    `leaks` is the table of leaks; only pairs with True in its column `leaks` are removed.
    """
    rows = rows[~rows["pair_id"].isin(leaks.loc[leaks["leaks"], "pair_id"])]
    for split in SPLITS:
        if not (rows["split"] == split).any():
            raise ValueError(f"data/diffcap: no pair is left in split {split}, but each of {', '.join(SPLITS)} must "
                             "have pairs: data/quarantine.parquet and data/reports/diffcap/leaks.parquet list the "
                             "removed pairs")
    return rows


def chosen_tables(folders: list[Path], rows: pd.DataFrame, split: str) -> Iterator[pa.Table]:
    """Yield the records of one split of DiffCap as Arrow tables, one per row group, in the order of the shards.

    `rows` holds the rows of the probe table for all pairs of DiffCap. Raises ValueError if a shard in `folders` changed
    after the probe table was written.
    """
    rows = rows[rows["split"] == split]
    for path, group, numbers, part in row_groups_with(folders, rows.index.to_numpy()):
        table = read_row_group(path, group).take(numbers)
        if table.column("pair_id").to_pylist() != rows["pair_id"].iloc[part].to_list():
            raise ValueError(f"{path}: this shard changed after data/probe.parquet was written; run 'dvc repro' to "
                             "update data/probe.parquet")
        yield table.select(SCHEMA.names).cast(SCHEMA)


def card(rows: pd.DataFrame, folder: Path, data: Data) -> dict[str, Any]:
    """Return the part of card.json about the shards of DiffCap: numbers of pairs, origins of sources, file digests.

    `folder` contains the shards, and `rows` holds the rows of the probe table for the pairs in these shards.
    """
    counts = nested_counts(rows.groupby(["split", "source", "change_type"]).size())
    return {
        "num_pairs": {split: counts.get(split, {}) for split in SPLITS},
        "num_references": int(rows["num_references"].sum()),
        "sources": {str(source): origin(str(source), data) for source in sorted(rows["source"].unique())},
        "digests": {path.name: digest(path.read_bytes()) for path in sorted(folder.glob("*.parquet"))},
    }


def leak_card(rows: pd.DataFrame, leaks: pd.DataFrame, *, near_bits: int, near_train: Mapping[str, Any],
              names: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of card.json about leaks between splits.

    `rows` holds the rows of the probe table for the pairs that remain in DiffCap. `leaks` is the table of leaks.
    Images and groups that occur in two splits are counted in `rows`, although the leak check should leave none.
    """
    dropped = leaks[leaks["leaks"]].drop_duplicates("pair_id")
    return {"images": num_shared(rows, "hash_before", "hash_after"), "groups": num_shared(rows, "group_id"),
            "dropped": nested_counts(dropped.groupby(["split", "source", "reason"]).size()),
            "num_dropped": len(dropped), "num_reported": int(leaks[~leaks["leaks"]]["pair_id"].nunique()),
            "near_train_images": dict(near_train), "near_bits": near_bits, "shared_published_names": dict(names)}


def num_shared(rows: pd.DataFrame, *columns: str) -> int:
    """Return how many different values of the given columns occur in more than one split, without empty values."""
    values = rows.melt("split", columns, value_name="value")
    num_splits = values[values["value"] != ""].groupby("value")["split"].nunique()
    return int((num_splits > 1).sum())


def origin(source: str, data: Data) -> dict[str, str]:
    """Return the description, the licence and the home of a source as a dict.

    If stage `write` generated the captions of this source, the key `captions` gives the model and the prompts.
    """
    raw, images, generators = f"data/raw/{source}", f"that of the images in data/raw/{source}", "onediff/data/synthesis"
    if source in CATALOG:
        what, licence, home = CATALOG[source].what, CATALOG[source].licence, CATALOG[source].home
    elif source in data.raw:
        what, licence, home = "pairs of your own", "your own", raw
    elif source in data.retrieved:
        what, licence, home = "neighbours found in a collection of captioned images", images, raw
    elif source in data.diffused:
        editor = data.diffusion.pipeline if data.diffusion else "a diffusion model"
        what, licence, home = f"images edited by {editor}", f"{images} and of the pipeline", raw
    elif source == "edits":
        what, home = "photographs, generated pictures and canvases edited by program, from a seed", generators
        licence = f"{LICENCE}; each photograph its own (scikit-image, scikit-learn, Matplotlib, or data.edits.photos)"
    else:
        what, licence, home = "rendered from a seed", LICENCE, generators
    facts = {"what": what, "licence": licence, "home": home}
    if source in data.written and data.writer is not None:
        facts["captions"] = f"written by {data.writer.model} ({data.writer.mode}, prompts {data.writer.prompts})"
    return facts


def incomplete_tests(probed: pd.DataFrame, rows: pd.DataFrame, reports: Mapping[str, Any]) -> dict[str, Any]:
    """Return a dict of the published sources whose test or gate split is incomplete in DiffCap.

    Each value holds the number of pairs in DiffCap, the number of pairs in the probe table, and the published numbers
    if they are known. `probed` is the complete probe table, `rows` holds its rows for the pairs in DiffCap, and
    `reports` maps each source to the report.json of stage `read`.
    """
    incomplete: dict[str, Any] = {}
    for source, report in reports.items():
        listed, present = (table.loc[table["source"] == source, "split"].value_counts() for table in (probed, rows))
        counts = {split: (int(present.get(split, 0)), int(listed.get(split, 0))) for split in ("test", "gate")}
        short = [split for split, (in_diffcap, in_probe) in counts.items() if in_diffcap != in_probe]
        test = report.get("splits", {}).get("test", {})
        if not short and test.get("complete", True):
            continue
        incomplete[source] = {}
        for split in dict.fromkeys(("test", *short)):
            incomplete[source] |= dict(zip((f"{split}_pairs", f"listed_{split}_pairs"), counts[split], strict=True))
        if test.get("expected"):
            incomplete[source] |= {"published": test["expected"],
                                   "read": {name: test[name] for name in test["expected"] if name in test}}
    return incomplete


def dataset_card(card: Mapping[str, Any]) -> str:
    """Return the text of README.md for DiffCap; its header tells `datasets.load_dataset` the files of each split."""
    counts = [(source, kind, count) for sources in card["num_pairs"].values()
              for source, kinds in sources.items() for kind, count in kinds.items()]
    licences = {facts["licence"] for facts in card["sources"].values()}
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["thousands"] = "{:,}".format
    template = environment.from_string(Path(__file__).with_name("card.md.j2").read_text(encoding="utf-8"))
    return template.render(
        card=card, splits=list(SPLITS), kinds=sorted({(source, kind) for source, kind, _ in counts}),
        licence=LICENCE.lower() if licences == {LICENCE} else "other",
        size=sum(count for _, _, count in counts)) + "\n"
