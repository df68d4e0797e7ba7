"""Which pairs of a split show what a later split holds: equal pixels, a published name, a group, or a near-duplicate.

The splits in order of precedence: what test holds leaves gate, val and train; test itself is never touched.
A near-duplicate is a candidate by its perceptual hash and a leak by the distance of its pixels.
"""

from __future__ import annotations

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
from onediff.data.quality.probe import row_groups
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
    images = [rows["hash_before"], rows["hash_after"]]
    named = (rows["name_before"] != "") & (rows["name_after"] != "")
    names = (rows["source"] + "\0" + rows["name_before"] + "\0" + rows["name_after"]).where(named, "")
    equal = [_equal(rows, values, reason) for values, reason in (
        (images, "equal image"), ([names], "equal published names"), ([rows["group_id"]], "equal group"))]
    found = pd.concat(equal, ignore_index=True)
    rest = rows[~rows["pair_id"].isin(found["pair_id"])]
    return pd.concat([found, near_duplicates(rest, settings, thumbnails)], ignore_index=True)


def refuse_leaks(found: pd.DataFrame, *, report: Path) -> None:
    """Raises ValueError if any pair leaks."""
    leaks = found[found["leaks"]]
    if len(leaks):
        first = leaks.iloc[0]
        raise ValueError(
            f"data/diffcap: {leaks['pair_id'].nunique()} pairs show what a later split holds (first: "
            f"{first['pair_id']} in {first['split']} and {first['partner']} in {first['partner_split']}: "
            f"{first['reason']}); remove them, or set data.leaks.action to drop; all of them: {report}")


def shared_names(table: pd.DataFrame) -> dict[str, dict[str, int]]:
    """Per source with published splits: image pairs, by published names, that two of the published splits share."""
    table = table[(table["official_split"] != "") & (table["name_before"] != "") & (table["name_after"] != "")]
    found = {}
    for source, rows in table.groupby("source"):
        pairs = {split: set(zip(part["name_before"], part["name_after"], strict=True))
                 for split, part in rows.groupby("official_split")}
        found[str(source)] = {f"{one}-{other}": len(pairs.get(one, set()) & pairs.get(other, set()))
                              for one, other in (("test", "val"), ("train", "val"), ("train", "test"))}
    return found


# --- equal values -----------------------------------------------------------------------------------------------------


def _ranks(rows: pd.DataFrame) -> NDArray[np.int64]:
    ranks: NDArray[np.int64] = rows["split"].map(SPLITS.index).to_numpy(dtype=np.int64)
    return ranks


def _equal(rows: pd.DataFrame, values: list[pd.Series], reason: str) -> pd.DataFrame:
    """Pairs one of whose values a later split holds too; the empty text is no value."""
    codes = pd.factorize(pd.concat(values, ignore_index=True))[0]
    given = np.concatenate([(value != "").to_numpy(dtype=bool) for value in values])
    row = np.tile(np.arange(len(rows)), len(values))[given]
    codes, rank = codes[given], _ranks(rows)[row]
    order = np.lexsort((row, -rank, codes))
    kinds, first = np.unique(codes[order], return_index=True)
    holder = np.zeros(int(codes.max(initial=-1)) + 1, dtype=np.int64)
    holder[kinds] = row[order[first]]  # of each value: the first row of the last split that has it
    partner = holder[codes]
    later = _ranks(rows)[partner] > rank
    found = pd.DataFrame({"row": row[later], "partner": partner[later]}).drop_duplicates("row").sort_values("row")
    return _lines(rows, found["row"].to_numpy(), found["partner"].to_numpy(), reason)


def _lines(rows: pd.DataFrame, pairs: NDArray[np.int64], partners: NDArray[np.int64], reason: str, *,
           distance: NDArray[np.float64] | float = np.nan, leaks: NDArray[np.bool_] | bool = True) -> pd.DataFrame:
    mine, theirs = rows.iloc[pairs].reset_index(drop=True), rows.iloc[partners].reset_index(drop=True)
    lines = pd.DataFrame({"pair_id": mine["pair_id"], "source": mine["source"], "split": mine["split"],
                          "reason": reason, "partner": theirs["pair_id"], "partner_source": theirs["source"],
                          "partner_split": theirs["split"], "distance": distance, "leaks": leaks})
    return lines.astype(COLUMNS)


# --- near-duplicates --------------------------------------------------------------------------------------------------


def near_duplicates(rows: pd.DataFrame, settings: Leaks, thumbnails: Thumbnails) -> pd.DataFrame:
    """For each pair with an image within `near_bits` of one of a later split: the nearest such image."""
    uses = _uses(rows)
    images = uses.drop_duplicates("image")
    nothing = np.zeros(0, dtype=np.int64)
    lines = [_lines(rows, nothing, nothing, NEAR)]
    for rank in range(len(SPLITS) - 1):
        late, early = images[images["rank"] > rank], images[images["rank"] == rank]
        measured = early["source"].isin(list(settings.max_distance))
        for mine, near in ((early[~measured], _nearest_hash), (early[measured], _nearest_pixels)):
            partner, distance = near(mine, late, settings.near_bits, thumbnails)
            hit = partner >= 0
            found = pd.DataFrame({"image": mine["image"].to_numpy()[hit], "distance": distance[hit],
                                  "partner": late["row"].to_numpy()[partner[hit]]})
            lines.append(_near_lines(rows, found.merge(uses[["image", "row"]], on="image"), settings.max_distance))
    return pd.concat(lines, ignore_index=True)


def _near_lines(rows: pd.DataFrame, found: pd.DataFrame, max_distance: dict[str, float | None]) -> pd.DataFrame:
    found = found.sort_values(["row", "distance"], kind="stable").drop_duplicates("row")  # the nearer of a pair's two
    row, distance = found["row"].to_numpy(), found["distance"].to_numpy()
    limits = rows["source"].iloc[row].map(max_distance).to_numpy(dtype=np.float64)
    return _lines(rows, row, found["partner"].to_numpy(), NEAR, distance=distance, leaks=distance <= limits)


def near_train_images(rows: pd.DataFrame, *, bits: int) -> dict[str, dict[str, int]]:
    """Per source and split: different images whose perceptual hash is within `bits` of a train image of any source."""
    images = _uses(rows).drop_duplicates("image")
    train = images.loc[images["rank"] == 0, "phash"].to_numpy(dtype=np.uint64)
    late = images[images["rank"] > 0]
    near = _nearest(late["phash"].to_numpy(dtype=np.uint64), train, bits) >= 0
    found: dict[str, dict[str, int]] = {}
    for key, count in pd.Series(near).groupby([late["source"].to_numpy(), late["rank"].to_numpy()]).sum().items():
        source, rank = cast(tuple[str, int], key)
        found.setdefault(source, {})[SPLITS[rank]] = int(count)
    return found


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


def _nearest_hash(mine: pd.DataFrame, late: pd.DataFrame, bits: int,
                  _: Thumbnails) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    partner = _nearest(mine["phash"].to_numpy(dtype=np.uint64), late["phash"].to_numpy(dtype=np.uint64), bits)
    return partner, np.full(len(mine), np.nan)


def _nearest_pixels(mine: pd.DataFrame, late: pd.DataFrame, bits: int,
                    thumbnails: Thumbnails) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Of all images within `bits`, the one with the smallest mean difference of grey levels; -1 where there is none.

    Candidates are sought twice, first to know which images to decode: holding them would be unbounded.
    """
    one, other = (part["phash"].to_numpy(dtype=np.uint64) for part in (mine, late))
    used = np.zeros(len(one), dtype=bool), np.zeros(len(other), dtype=bool)
    for first, second in candidates(one, other, bits):
        used[0][first], used[1][second] = True, True
    looks = [_decoded(part, mask, thumbnails) for part, mask in zip((mine, late), used, strict=True)]
    return _closest(one, other, bits, lambda first, second: np.abs(
        looks[0][first].astype(np.int16) - looks[1][second]).mean(axis=1))


def _decoded(images: pd.DataFrame, used: NDArray[np.bool_], thumbnails: Thumbnails) -> NDArray[np.uint8]:
    """(images, pixels) with zeros where an image is not used, which costs no memory before it is touched."""
    looks = np.zeros((len(images), THUMBNAIL_PX**2), dtype=np.uint8)
    if used.any():
        looks[used] = thumbnails(images["label"].to_numpy()[used], images["side"].to_numpy()[used])
    return looks


def _bytes(hashes: NDArray[np.uint64]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(hashes).view(np.uint8).reshape(-1, 8)


def _nearest(hashes: NDArray[np.uint64], others: NDArray[np.uint64], bits: int) -> NDArray[np.int64]:
    """For each hash the index of the nearest of `others` that is within `bits`, or -1."""
    kinds, back = np.unique(hashes, return_inverse=True)
    values, place = np.unique(others, return_index=True)
    found = _closest(kinds, values, bits, lambda first, second: np.bitwise_count(kinds[first] ^ values[second]))[0]
    return np.where(found >= 0, place[found] if len(place) else -1, -1)[back]


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
    for begin in range(0, len(others), _SLICE):
        index = faiss.IndexBinaryFlat(64)
        index.add(_bytes(others[begin : begin + _SLICE]))
        for start in range(0, len(hashes), _BLOCK):
            part = hashes[start : start + _BLOCK]
            limits, _, found = index.range_search(_bytes(part), bits + 1)  # below this radius
            ends = limits.astype(np.int64)
            first = start + np.repeat(np.arange(len(part)), ends[1:] - ends[:-1])
            for low in range(0, len(found), _CHUNK):
                yield first[low : low + _CHUNK], begin + found[low : low + _CHUNK]


# --- thumbnails from the shards ---------------------------------------------------------------------------------------


def read_thumbnails(folders: list[Path], labels: NDArray[np.int64], sides: NDArray[np.int64], *,
                    max_megapixels: float, runtime: Runtime) -> NDArray[np.uint8]:
    """(images, pixels) in grey: `labels` count the records of the folders' shards in order, side 0 is before."""
    order = np.argsort(labels, kind="stable")
    parts = spread(functools.partial(_Reader, max_megapixels), _wanted(folders, labels[order], sides[order]), runtime)
    looks = np.zeros((len(labels), THUMBNAIL_PX**2), dtype=np.uint8)
    looks[order] = np.concatenate(list(parts))
    return looks


def _wanted(folders: list[Path], labels: NDArray[np.int64], sides: NDArray[np.int64]) -> Iterator[Any]:
    """(shard, row group, rows in it, their sides) for each row group that holds any of the sorted labels."""
    for path, group, start, end in row_groups(folders):
        low, high = np.searchsorted(labels, [start, end])
        if low < high:
            yield path, group, labels[low:high] - start, sides[low:high]


class _Reader:
    def __init__(self, max_megapixels: float) -> None:
        self.max_megapixels = max_megapixels

    def __call__(self, item: tuple[Path, int, NDArray[np.int64], NDArray[np.int64]]) -> NDArray[np.uint8]:
        path, group, rows, sides = item
        table = pq.ParquetFile(path).read_row_group(group, columns=["before", "after"])
        images = [table.column(int(side))[int(row)].as_py()["bytes"] for row, side in zip(rows, sides, strict=True)]
        return np.stack([thumbnail(open_image(image, max_megapixels=self.max_megapixels)) for image in images])


def thumbnail(image: Image.Image) -> NDArray[np.uint8]:
    grey = image.convert("L").resize((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.BOX)
    return np.asarray(grey).ravel()
