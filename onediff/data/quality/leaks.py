"""Finds leaks: pairs whose content also occurs in a later split (order: train, val, gate, test).

A pair leaks if a pair of a later split has an equal image, equal published names, the same group or a near-duplicate
image. Only the pair in the earlier split is removed, so test pairs always stay. Near-duplicate images have similar
perceptual hashes; the pixel difference then decides whether the pair leaks.
"""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from onediff.config import Leaks, Runtime
from onediff.data.parallel import spread
from onediff.data.quality.probe import row_groups_with
from onediff.data.record import SPLITS, read_row_group
from onediff.inputs.images import open_image

COLUMNS = {"pair_id": "str", "source": "str", "split": "str", "reason": "str", "partner": "str",
           "partner_source": "str", "partner_split": "str", "distance": "float64", "leaks": "bool"}
THUMBNAIL_PX = 32
NEAR = "near-duplicate image"
# These numbers limit memory use: query images per search, stored images per index, and pairs of images per result.
_BLOCK, _SLICE, _CHUNK = 256, 65_536, 8_192

Thumbnails = Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.uint8]]


def find_leaks(rows: pd.DataFrame, settings: Leaks, thumbnails: Thumbnails) -> pd.DataFrame:
    """Return a table with the columns COLUMNS: one line for each pair and reason, with a partner in a later split.

    `rows` holds rows of the probe table; their index is the position of the record in all shards. The column `distance`
    is the mean difference of two near-duplicate images in grey levels, and NaN if `settings.max_distance` has no limit
    for the source. The column `leaks` is False if the pair is only reported and may stay: near-duplicates whose
    distance is above the limit, or without a limit.
    """
    named = (rows["name_before"] != "") & (rows["name_after"] != "")
    names = (rows["source"] + "\0" + rows["name_before"] + "\0" + rows["name_after"]).where(named, "")
    equal = pd.concat([_equal(rows, [rows["hash_before"], rows["hash_after"]], "equal image"),
                       _equal(rows, [names], "equal published names"),
                       _equal(rows, [rows["group_id"]], "equal group")], ignore_index=True)
    rest = rows[~rows["pair_id"].isin(equal["pair_id"])]
    return pd.concat([equal, _near_duplicates(rest, settings, thumbnails)], ignore_index=True)


def refuse_leaks(lines: pd.DataFrame, *, report: Path) -> None:
    """Raise ValueError if any pair leaks; `report` is the file that lists all leaks."""
    leaks = lines[lines["leaks"]]
    if len(leaks):
        first = leaks.iloc[0]
        raise ValueError(
            f"data/diffcap: {leaks['pair_id'].nunique()} pairs also occur in a later split (first: "
            f"{first['pair_id']} in {first['split']} and {first['partner']} in {first['partner_split']}: "
            f"{first['reason']}); remove these pairs, or set data.leaks.action to drop; {report} lists all leaks")


def shared_names(table: pd.DataFrame) -> dict[str, dict[str, int]]:
    """Return for each source with published splits how many pairs of image names occur in two of these splits.

    The keys of each inner dict are test-val, train-val and train-test.
    """
    table = table[(table["official_split"] != "") & (table["name_before"] != "") & (table["name_after"] != "")]
    shared = {}
    for source, rows in table.groupby("source"):
        pairs = {split: set(zip(part["name_before"], part["name_after"], strict=True))
                 for split, part in rows.groupby("official_split")}
        shared[str(source)] = {f"{one}-{other}": len(pairs.get(one, set()) & pairs.get(other, set()))
                               for one, other in (("test", "val"), ("train", "val"), ("train", "test"))}
    return shared


def nested_counts(counts: pd.Series) -> dict[str, Any]:
    """Convert a series of counts with a multi-level index, such as a group-by result, to nested dictionaries."""
    nested: dict[str, Any] = {}
    for key, count in counts.items():
        *keys, last = cast(tuple[str, ...], key)
        inner = nested
        for outer in keys:
            inner = inner.setdefault(outer, {})
        inner[last] = int(count)
    return nested


def _ranks(rows: pd.DataFrame) -> NDArray[np.int64]:
    """Return for each row of the probe table the index of its split in SPLITS."""
    return np.asarray(rows["split"].map(SPLITS.index), dtype=np.int64)


def _equal(rows: pd.DataFrame, columns: list[pd.Series], reason: str) -> pd.DataFrame:
    """Return a table of leaks for pairs that share a value of the given columns with a pair of a later split.

    Empty values do not count. `reason` is the text for the column `reason` of the table.
    """
    ranks = _ranks(rows)
    uses = pd.concat([pd.DataFrame({"row": np.arange(len(rows)), "rank": ranks, "value": column.to_numpy()})
                      for column in columns])
    uses = uses[uses["value"] != ""]
    # The partner of a leaking pair is the first pair with this value in the last split that contains the value.
    holders = uses.sort_values(["rank", "row"], ascending=[False, True]).drop_duplicates("value").set_index("value")
    uses["partner"] = uses["value"].map(holders["row"]).astype("int64")
    leaking = uses[ranks[uses["partner"]] > uses["rank"]].drop_duplicates("row").sort_values("row")
    return _lines(rows, leaking["row"].to_numpy(), leaking["partner"].to_numpy(), reason)


def _lines(rows: pd.DataFrame, pairs: NDArray[np.int64], partners: NDArray[np.int64], reason: str, *,
           distance: NDArray[np.float64] | float = np.nan, leaks: NDArray[np.bool_] | bool = True) -> pd.DataFrame:
    """Return a table of leaks; `pairs` and `partners` are row numbers of leaking pairs and their partners in `rows`."""
    left, right = rows.iloc[pairs].reset_index(drop=True), rows.iloc[partners].reset_index(drop=True)
    lines = pd.DataFrame({"pair_id": left["pair_id"], "source": left["source"], "split": left["split"],
                          "reason": reason, "partner": right["pair_id"], "partner_source": right["source"],
                          "partner_split": right["split"], "distance": distance, "leaks": leaks})
    return lines.astype(COLUMNS)



def _near_duplicates(rows: pd.DataFrame, settings: Leaks, thumbnails: Thumbnails) -> pd.DataFrame:
    """Return a table of leaks for pairs with a near-duplicate in a later split. The partner has the nearest image.

    Two images are near-duplicates if their perceptual hashes differ in at most `settings.near_bits` bits.
    """
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
            # If both images of a pair have a near-duplicate, keep only the nearer one.
            near = near.sort_values(["row", "distance"], kind="stable").drop_duplicates("row")
            limits = rows["source"].iloc[near["row"]].map(settings.max_distance).to_numpy(dtype=np.float64)
            lines.append(_lines(rows, near["row"].to_numpy(), near["partner"].to_numpy(), NEAR,
                                distance=near["distance"].to_numpy(), leaks=near["distance"].to_numpy() <= limits))
    return pd.concat(lines, ignore_index=True)


def near_train_images(rows: pd.DataFrame, *, bits: int) -> dict[str, dict[str, int]]:
    """Count the different images of each source in val, gate and test that resemble a training image of any source.

    Return a dict from source to a dict from split to the number. Two images resemble each other if their perceptual
    hashes differ in at most `bits` bits.
    """
    images = _uses(rows).drop_duplicates("image")
    late = images[images["rank"] > 0]
    near = _nearest(_hashes(late), _hashes(images[images["rank"] == 0]), bits) >= 0
    splits = np.array(SPLITS, dtype=object)[late["rank"]]
    return nested_counts(pd.Series(near).groupby([late["source"].to_numpy(), splits]).sum())


def _uses(rows: pd.DataFrame) -> pd.DataFrame:
    """Return a table with one row for each readable image of each pair.

    Columns: `row` (row number of the pair in `rows`), `label` (position of the record in all shards), `side` (0 for
    before, 1 for after), `source`, `rank` (index of the split in SPLITS), `phash` (perceptual hash) and `image` (a
    number for each different image of a source and split).
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
    """Return for each image the index of the most similar image of `others`, and their mean difference in grey levels.

    Only images whose perceptual hashes differ in at most `bits` bits are compared; without such an image, the index is
    -1. The comparable images are searched twice, because storing all of them could need too much memory. The first
    search determines which images must be decoded.
    """
    used = np.zeros(len(images), dtype=bool), np.zeros(len(others), dtype=bool)
    for first, second in candidates(_hashes(images), _hashes(others), bits):
        used[0][first], used[1][second] = True, True
    # The rows of images that are not decoded use no memory, because the system allocates a page at the first write.
    pixels = [np.zeros((len(mask), THUMBNAIL_PX**2), dtype=np.uint8) for mask in used]
    for table, mask, values in zip((images, others), used, pixels, strict=True):
        if mask.any():
            values[mask] = thumbnails(table["label"].to_numpy()[mask], table["side"].to_numpy()[mask])
    return _closest(_hashes(images), _hashes(others), bits, lambda first, second: np.abs(
        pixels[0][first].astype(np.int16) - pixels[1][second]).mean(axis=1))


def _nearest(hashes: NDArray[np.uint64], others: NDArray[np.uint64], bits: int) -> NDArray[np.int64]:
    """Return for each hash the index of the nearest hash of `others`, or -1 if none differs in at most `bits` bits."""
    kinds, back = np.unique(hashes, return_inverse=True)
    values, place = np.unique(others, return_index=True)
    nearest = _closest(kinds, values, bits, lambda first, second: np.bitwise_count(kinds[first] ^ values[second]))[0]
    return np.append(place, -1)[nearest][back]


def _closest(hashes: NDArray[np.uint64], others: NDArray[np.uint64], bits: int,
             apart: Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[Any]],
             ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return for each hash the index of the closest candidate of `others`, and the distance to it.

    A candidate is a hash of `others` that differs in at most `bits` bits; without a candidate, the index is -1. `apart`
    takes two arrays of indices and returns the distances. Of two equally close candidates, the first is returned.
    """
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
    """Find the hashes of `hashes` and `others` that differ in at most `bits` bits.

    Yield two arrays of equal length at a time: indices in `hashes`, and the matching indices in `others`. Each array
    has at most a few thousand elements.
    """
    import faiss

    # On a busy machine, several threads of faiss wait for each other: 46 s instead of 3 s with one thread.
    faiss.omp_set_num_threads(1)
    queries, stored = (np.ascontiguousarray(values).view(np.uint8).reshape(-1, 8) for values in (hashes, others))
    for begin in range(0, len(stored), _SLICE):
        index = faiss.IndexBinaryFlat(64)
        index.add(stored[begin : begin + _SLICE])
        for start in range(0, len(queries), _BLOCK):
            # faiss returns hashes with a distance below the radius, so the radius is bits + 1.
            limits, _, neighbours = index.range_search(queries[start : start + _BLOCK], bits + 1)
            ends = limits.astype(np.int64)
            first = start + np.repeat(np.arange(len(ends) - 1), ends[1:] - ends[:-1])
            for low in range(0, len(neighbours), _CHUNK):
                yield first[low : low + _CHUNK], begin + neighbours[low : low + _CHUNK]



def read_thumbnails(folders: list[Path], labels: NDArray[np.int64], sides: NDArray[np.int64], *,
                    max_megapixels: float, runtime: Runtime) -> NDArray[np.uint8]:
    """Return grey thumbnails of the given images, in the given order, with shape (images, pixels).

    `labels` holds the position of each image's record in all shards of the folders. `sides` holds 0 for the image
    before and 1 for the image after.
    """
    order = np.argsort(labels, kind="stable")
    parts = [(path, group, rows, sides[order][part])
             for path, group, rows, part in row_groups_with(folders, labels[order])]
    pixels = np.zeros((len(labels), THUMBNAIL_PX**2), dtype=np.uint8)
    pixels[order] = np.concatenate(list(spread(functools.partial(_Reader, max_megapixels), parts, runtime)))
    return pixels


class _Reader:
    """A worker that reads images of one row group of a shard and returns their grey thumbnails."""

    def __init__(self, max_megapixels: float) -> None:
        self.max_megapixels = max_megapixels

    def __call__(self, part: tuple[Path, int, NDArray[np.int64], NDArray[np.int64]]) -> NDArray[np.uint8]:
        path, group, rows, sides = part
        table = read_row_group(path, group, ["before", "after"])
        images = [table.column(int(side))[int(row)].as_py()["bytes"] for row, side in zip(rows, sides, strict=True)]
        return np.stack([thumbnail(open_image(image, max_megapixels=self.max_megapixels)) for image in images])


def thumbnail(image: Image.Image) -> NDArray[np.uint8]:
    """Return the grey levels of the image, resized to THUMBNAIL_PX x THUMBNAIL_PX, as a flat array."""
    return np.asarray(image.convert("L").resize((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.BOX)).ravel()
