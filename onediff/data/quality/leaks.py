"""Which pairs of a split show what a later split holds: equal pixels, a published name, a group, or a near-duplicate.

The splits in order of precedence: what test holds leaves gate, val and train; test itself is never touched.
A near-duplicate is a candidate by its perceptual hash and a leak by the distance of its pixels.
"""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from onediff.config import Leaks, Runtime
from onediff.data.parallel import spread
from onediff.data.quality.probe import row_groups_with
from onediff.data.record import SPLITS
from onediff.inputs.images import open_image

COLUMNS = {"pair_id": "str", "source": "str", "split": "str", "reason": "str", "partner": "str",
           "partner_source": "str", "partner_split": "str", "distance": "float64", "leaks": "bool"}
THUMBNAIL_PX = 32
NEAR = "near-duplicate image"
_BLOCK, _SLICE, _CHUNK = 256, 65_536, 8_192  # images, images and pairs compared at once: what bounds the memory

Thumbnails = Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.uint8]]


def find_leaks(rows: pd.DataFrame, settings: Leaks, thumbnails: Thumbnails) -> pd.DataFrame:
    """One line per pair and reason: the pair, its partner in a later split, `distance` in grey levels where measured.

    `rows`: the probe table's, labelled by their place in it. Where `leaks` is false the pair is only reported: its
    source has no max_distance or the pixels are further apart. A source that max_distance does not name is not
    measured.
    """
    named = (rows["name_before"] != "") & (rows["name_after"] != "")
    names = (rows["source"] + "\0" + rows["name_before"] + "\0" + rows["name_after"]).where(named, "")
    equal = pd.concat([_equal(rows, [rows["hash_before"], rows["hash_after"]], "equal image"),
                       _equal(rows, [names], "equal published names"),
                       _equal(rows, [rows["group_id"]], "equal group")], ignore_index=True)
    rest = rows[~rows["pair_id"].isin(equal["pair_id"])]
    return pd.concat([equal, _near_duplicates(rest, settings, thumbnails)], ignore_index=True)


def refuse_leaks(lines: pd.DataFrame, *, report: Path) -> None:
    """Raises ValueError if any pair leaks."""
    leaks = lines[lines["leaks"]]
    if len(leaks):
        first = leaks.iloc[0]
        raise ValueError(
            f"data/diffcap: {leaks['pair_id'].nunique()} pairs show what a later split holds (first: "
            f"{first['pair_id']} in {first['split']} and {first['partner']} in {first['partner_split']}: "
            f"{first['reason']}); remove them, or set data.leaks.action to drop; all of them: {report}")


def shared_names(table: pd.DataFrame) -> dict[str, dict[str, int]]:
    """Per source with published splits: image pairs, by published names, that two of the published splits share."""
    table = table[(table["official_split"] != "") & (table["name_before"] != "") & (table["name_after"] != "")]
    shared = {}
    for source, rows in table.groupby("source"):
        pairs = {split: set(zip(part["name_before"], part["name_after"], strict=True))
                 for split, part in rows.groupby("official_split")}
        shared[str(source)] = {f"{one}-{other}": len(pairs.get(one, set()) & pairs.get(other, set()))
                               for one, other in (("test", "val"), ("train", "val"), ("train", "test"))}
    return shared


def nested_counts(counts: pd.Series) -> dict[str, Any]:
    """Counts with several keys each, such as those of a group-by, as dictionaries inside dictionaries."""
    nested: dict[str, Any] = {}
    for key, count in counts.items():
        *keys, last = cast(tuple[str, ...], key)
        inner = nested
        for outer in keys:
            inner = inner.setdefault(outer, {})
        inner[last] = int(count)
    return nested


# --- equal values -----------------------------------------------------------------------------------------------------


def _ranks(rows: pd.DataFrame) -> NDArray[np.int64]:
    return np.asarray(rows["split"].map(SPLITS.index), dtype=np.int64)


def _equal(rows: pd.DataFrame, columns: list[pd.Series], reason: str) -> pd.DataFrame:
    """Pairs one of whose values a later split holds too; the empty text is no value."""
    ranks = _ranks(rows)
    uses = pd.concat([pd.DataFrame({"row": np.arange(len(rows)), "rank": ranks, "value": column.to_numpy()})
                      for column in columns])
    uses = uses[uses["value"] != ""]
    # Of each value: the first row of the last split that has it.
    holders = uses.sort_values(["rank", "row"], ascending=[False, True]).drop_duplicates("value").set_index("value")
    uses["partner"] = uses["value"].map(holders["row"]).astype("int64")
    leaking = uses[ranks[uses["partner"]] > uses["rank"]].drop_duplicates("row").sort_values("row")
    return _lines(rows, leaking["row"].to_numpy(), leaking["partner"].to_numpy(), reason)


def _lines(rows: pd.DataFrame, pairs: NDArray[np.int64], partners: NDArray[np.int64], reason: str, *,
           distance: NDArray[np.float64] | float = np.nan, leaks: NDArray[np.bool_] | bool = True) -> pd.DataFrame:
    left, right = rows.iloc[pairs].reset_index(drop=True), rows.iloc[partners].reset_index(drop=True)
    lines = pd.DataFrame({"pair_id": left["pair_id"], "source": left["source"], "split": left["split"],
                          "reason": reason, "partner": right["pair_id"], "partner_source": right["source"],
                          "partner_split": right["split"], "distance": distance, "leaks": leaks})
    return lines.astype(COLUMNS)


# --- near-duplicates --------------------------------------------------------------------------------------------------


def _near_duplicates(rows: pd.DataFrame, settings: Leaks, thumbnails: Thumbnails) -> pd.DataFrame:
    """For each pair with an image within `near_bits` of one of a later split: the nearest such image."""
    uses = _uses(rows)
    images = uses.drop_duplicates("image")
    nothing = np.zeros(0, dtype=np.int64)
    lines = [_lines(rows, nothing, nothing, NEAR)]
    for rank in range(len(SPLITS) - 1):
        late, early = images[images["rank"] > rank], images[images["rank"] == rank]
        named = early["source"].isin(list(settings.max_distance))
        unmeasured, measured = early[~named], early[named]
        for candidate, partner, distance in (
                (unmeasured, _nearest(_hashes(unmeasured), _hashes(late), settings.near_bits), np.nan),
                (measured, *_nearest_pixels(measured, late, settings.near_bits, thumbnails))):
            near = pd.DataFrame({"image": candidate["image"], "distance": distance,
                                 "partner": np.append(late["row"], -1)[partner]})[partner >= 0]
            near = near.merge(uses[["image", "row"]], on="image")
            near = near.sort_values(["row", "distance"], kind="stable").drop_duplicates("row")  # the nearer of the two
            limits = rows["source"].iloc[near["row"]].map(settings.max_distance).to_numpy(dtype=np.float64)
            lines.append(_lines(rows, near["row"].to_numpy(), near["partner"].to_numpy(), NEAR,
                                distance=near["distance"].to_numpy(), leaks=near["distance"].to_numpy() <= limits))
    return pd.concat(lines, ignore_index=True)


def near_train_images(rows: pd.DataFrame, *, bits: int) -> dict[str, dict[str, int]]:
    """Per source and split: different images whose perceptual hash is within `bits` of a train image of any source."""
    images = _uses(rows).drop_duplicates("image")
    late = images[images["rank"] > 0]
    near = _nearest(_hashes(late), _hashes(images[images["rank"] == 0]), bits) >= 0
    splits = np.array(SPLITS, dtype=object)[late["rank"]]
    return nested_counts(pd.Series(near).groupby([late["source"].to_numpy(), splits]).sum())


def _uses(rows: pd.DataFrame) -> pd.DataFrame:
    """Every image of every pair: its row (counted), label (place in the probe table), side, hash, and its number.

    The same picture has the same number wherever it occurs in a source and split.
    """
    sides = [pd.DataFrame({"row": np.arange(len(rows)), "label": rows.index.to_numpy(), "side": number,
                           "source": rows["source"].to_numpy(), "rank": _ranks(rows),
                           "hash": rows[f"hash_{side}"].to_numpy(),
                           "phash": rows[f"phash_{side}"].to_numpy(dtype=np.uint64)})
             for number, side in enumerate(("before", "after"))]
    uses = pd.concat(sides, ignore_index=True)
    uses = uses[uses["hash"] != ""].sort_values(["row", "side"], ignore_index=True)
    uses["image"] = uses.groupby(["rank", "source", "hash"], sort=False).ngroup()
    return uses.drop(columns="hash")


def _hashes(images: pd.DataFrame) -> NDArray[np.uint64]:
    return images["phash"].to_numpy(dtype=np.uint64)


def _nearest_pixels(images: pd.DataFrame, others: pd.DataFrame, bits: int,
                    thumbnails: Thumbnails) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Of all images within `bits`, the one with the smallest mean difference of grey levels; -1 where there is none.

    Candidates are searched twice, first to know which images to decode: holding them would be unbounded.
    """
    used = np.zeros(len(images), dtype=bool), np.zeros(len(others), dtype=bool)
    for first, second in candidates(_hashes(images), _hashes(others), bits):
        used[0][first], used[1][second] = True, True
    # Zeros where an image is not used, which cost no memory before they are touched.
    pixels = [np.zeros((len(mask), THUMBNAIL_PX**2), dtype=np.uint8) for mask in used]
    for table, mask, values in zip((images, others), used, pixels, strict=True):
        if mask.any():
            values[mask] = thumbnails(table["label"].to_numpy()[mask], table["side"].to_numpy()[mask])
    return _closest(_hashes(images), _hashes(others), bits, lambda first, second: np.abs(
        pixels[0][first].astype(np.int16) - pixels[1][second]).mean(axis=1))


def _nearest(hashes: NDArray[np.uint64], others: NDArray[np.uint64], bits: int) -> NDArray[np.int64]:
    """For each hash the index of the nearest of `others` that is within `bits`, or -1."""
    kinds, back = np.unique(hashes, return_inverse=True)
    values, place = np.unique(others, return_index=True)
    nearest = _closest(kinds, values, bits, lambda first, second: np.bitwise_count(kinds[first] ^ values[second]))[0]
    return np.append(place, -1)[nearest][back]


def _closest(hashes: NDArray[np.uint64], others: NDArray[np.uint64], bits: int,
             apart: Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[Any]],
             ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """For each hash, of the others within `bits`: the index of the first that is least `apart`, or -1, and how far."""
    partner, distance = np.full(len(hashes), -1), np.full(len(hashes), np.inf)
    for first, second in candidates(hashes, others, bits):
        measured = apart(first, second)
        order = np.lexsort((second, measured, first))
        first, second, measured = first[order], second[order], measured[order]
        best = np.unique(first, return_index=True)[1]
        best = best[measured[best] < distance[first[best]]]
        partner[first[best]], distance[first[best]] = second[best], measured[best]
    return partner, distance


def candidates(hashes: NDArray[np.uint64], others: NDArray[np.uint64],
                bits: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Every (index, index) of hashes within `bits`, some thousand at a time."""
    import faiss

    faiss.omp_set_num_threads(1)  # with two and a busy machine, its threads wait for each other: 46 s instead of 3
    queries, stored = (np.ascontiguousarray(values).view(np.uint8).reshape(-1, 8) for values in (hashes, others))
    for begin in range(0, len(stored), _SLICE):
        index = faiss.IndexBinaryFlat(64)
        index.add(stored[begin : begin + _SLICE])
        for start in range(0, len(queries), _BLOCK):
            limits, _, neighbours = index.range_search(queries[start : start + _BLOCK], bits + 1)  # below this radius
            ends = limits.astype(np.int64)
            first = start + np.repeat(np.arange(len(ends) - 1), ends[1:] - ends[:-1])
            for low in range(0, len(neighbours), _CHUNK):
                yield first[low : low + _CHUNK], begin + neighbours[low : low + _CHUNK]


# --- thumbnails from the shards ---------------------------------------------------------------------------------------


def read_thumbnails(folders: list[Path], labels: NDArray[np.int64], sides: NDArray[np.int64], *,
                    max_megapixels: float, runtime: Runtime) -> NDArray[np.uint8]:
    """(images, pixels) in grey: `labels` count the records of the folders' shards in order, side 0 is before."""
    order = np.argsort(labels, kind="stable")
    parts = [(path, group, rows, sides[order][part])
             for path, group, rows, part in row_groups_with(folders, labels[order])]
    pixels = np.zeros((len(labels), THUMBNAIL_PX**2), dtype=np.uint8)
    pixels[order] = np.concatenate(list(spread(functools.partial(_Reader, max_megapixels), parts, runtime)))
    return pixels


class _Reader:
    def __init__(self, max_megapixels: float) -> None:
        self.max_megapixels = max_megapixels

    def __call__(self, part: tuple[Path, int, NDArray[np.int64], NDArray[np.int64]]) -> NDArray[np.uint8]:
        path, group, rows, sides = part
        table = pq.ParquetFile(path).read_row_group(group, columns=["before", "after"])
        images = [table.column(int(side))[int(row)].as_py()["bytes"] for row, side in zip(rows, sides, strict=True)]
        return np.stack([thumbnail(open_image(image, max_megapixels=self.max_megapixels)) for image in images])


def thumbnail(image: Image.Image) -> NDArray[np.uint8]:
    return np.asarray(image.convert("L").resize((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.BOX)).ravel()
