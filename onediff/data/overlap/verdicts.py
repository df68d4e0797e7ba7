"""The leak audit of DiffCap: which images and captions of each test benchmark occur in the training split."""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from onediff.data.overlap.captions import RULE, CaptionIndex, prepared
from onediff.data.record import read_table, shards


def verdicts(folder: Path, rows: pd.DataFrame, leaks: pd.DataFrame) -> dict[str, Any]:
    """Return the result of the leak audit for each test benchmark.

    `rows` are the rows of the probe table whose pairs are in DiffCap, and `leaks` is the table of the leak check. The
    keys equal_image, equal_caption, rare_caption, near_caption (see captions.py) and leaks count pairs of the test
    split. `dropped` counts the training pairs that were removed because they leak, and `lookalikes` the similar
    training pairs that were kept. `nearest` is the smallest distance of a lookalike in grey levels, or None if no
    distance was measured. `verdict` is "clean" or says how many test pairs leak.
    """
    texts: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for row in _rows(folder, "test"):
        texts[row["source"]] += [(row["pair_id"], text) for text in row["references"]]
    indexes = {source: CaptionIndex(captions) for source, captions in texts.items()}
    for row in _rows(folder, "train"):
        turns = row["provenance"].get("conversation") or []
        for text in map(prepared, [*row["references"], *(answer for _, answer in turns)]):
            for index in indexes.values():
                index.add_text(text, row["pair_id"])
    train = rows[rows["split"] == "train"]
    train_hashes = {*train["hash_before"], *train["hash_after"]} - {""}
    train_and_test = leaks[(leaks["split"] == "train") & (leaks["partner_split"] == "test")]
    benchmarks = {}
    for source, index in indexes.items():
        test = rows[(rows["split"] == "test") & (rows["source"] == source)]
        is_equal = test[["hash_before", "hash_after"]].isin(train_hashes).any(axis=1)
        pairs = index.pairs() | {"equal_image": set(test.loc[is_equal, "pair_id"])}
        pairs["leaks"] = pairs["equal_image"] | pairs["rare_caption"] | pairs["near_caption"]
        counts = {"num_pairs": len(test)} | {name: len(names) for name, names in pairs.items()}
        partners = train_and_test[train_and_test["partner_source"] == source]
        dropped, near = partners[partners["leaks"]], partners[~partners["leaks"]]
        benchmarks[source] = counts | {
            "dropped": int(dropped["pair_id"].nunique()), "lookalikes": int(near["pair_id"].nunique()),
            "nearest": float(near["distance"].min()) if near["distance"].notna().any() else None,
            "verdict": f"{counts['leaks']} of {len(test)} test pairs leak" if counts["leaks"] else "clean"}
    return {"rule": RULE, "benchmarks": benchmarks}


def _rows(folder: Path, split: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a split without the images, reading one shard at a time."""
    for path in shards(folder, f"{split}-*.parquet"):
        yield from read_table(folder, path.name)
