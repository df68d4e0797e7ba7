"""What the training split of DiffCap holds of each test benchmark: images by the leak check, captions by overlap.py."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq

from onediff.data.overlap.captions import RULE, Captions, prepared
from onediff.data.record import shards

_COLUMNS = ["pair_id", "source", "references", "provenance"]


def verdicts(folder: Path, rows: pd.DataFrame, leaks: pd.DataFrame) -> dict[str, Any]:
    """By test benchmark: equal_image, equal_caption, rare_caption, near_caption, leaks (pairs of the test split);
    dropped (training pairs that left because of it), lookalikes (that stay) and the nearest one's grey levels, None
    where nothing was measured; the verdict, "clean" or how many leak.

    `rows`: of the probe table, those that stayed; `leaks`: all that the leak check found.
    """
    captions = _tested(folder)
    for row, texts in _texts(folder, "train"):
        for text in map(prepared, texts):
            for its in captions.values():
                its.look(text, row["pair_id"])
    found = {}
    for source, its in captions.items():
        test = rows[(rows["split"] == "test") & (rows["source"] == source)]
        pairs = its.pairs() | {"equal_image": _equal_images(test, rows[rows["split"] == "train"])}
        pairs["leaks"] = pairs["equal_image"] | pairs["rare_caption"] | pairs["near_caption"]
        counts = {"num_pairs": len(test)} | {name: len(names) for name, names in pairs.items()}
        said = f"{counts['leaks']} of {len(test)} test pairs leak" if counts["leaks"] else "clean"
        found[source] = counts | _leak_check(leaks, source) | {"verdict": said}
    return {"rule": RULE, "benchmarks": found}


def _tested(folder: Path) -> dict[str, Captions]:
    texts: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for row, _ in _texts(folder, "test"):
        texts[row["source"]] += [(row["pair_id"], text) for text in row["references"]]
    return {source: Captions(its) for source, its in texts.items()}


def _texts(folder: Path, split: str) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """Each row without its images, and all that is said in it."""
    for path in shards(folder, f"{split}-*.parquet"):
        for batch in pq.ParquetFile(path).iter_batches(columns=_COLUMNS):
            for row in batch.to_pylist():
                turns = json.loads(row["provenance"]).get("conversation") or []
                yield row, [*row["references"], *(answer for _, answer in turns)]


def _equal_images(test: pd.DataFrame, train: pd.DataFrame) -> set[str]:
    held = set(train["hash_before"]) | set(train["hash_after"])
    shown = test["hash_before"].isin(held - {""}) | test["hash_after"].isin(held - {""})
    return set(test.loc[shown, "pair_id"])


def _leak_check(leaks: pd.DataFrame, source: str) -> dict[str, Any]:
    its = leaks[(leaks["split"] == "train") & (leaks["partner_split"] == "test") & (leaks["partner_source"] == source)]
    near = its[~its["leaks"]]
    return {"dropped": int(its.loc[its["leaks"], "pair_id"].nunique()), "lookalikes": int(near["pair_id"].nunique()),
            "nearest": float(near["distance"].min()) if near["distance"].notna().any() else None}
