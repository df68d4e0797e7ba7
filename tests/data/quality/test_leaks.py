from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from PIL import Image

from onediff.config import Leaks, Runtime
from onediff.data.quality.leaks import (
    find_leaks,
    near_train_images,
    read_thumbnails,
    refuse_leaks,
    shared_names,
    thumbnail,
)
from onediff.data.record import SPLITS, Record, write_shards

ROOT = Path(__file__).parents[3]
CASES = ROOT.parent / "shared/cases/annotations"
REPORT_ONLY = Leaks(action="drop", near_bits=3, max_distance={})
MEASURED = Leaks(action="drop", near_bits=3, max_distance={"web": 2.0})


def row(number: int, split: str, source: str = "web", **values: Any) -> dict[str, Any]:
    """Return a row of the probe table with values that no other number has; `values` replace single columns."""
    rng = np.random.default_rng(number)
    return {"pair_id": f"{source}-{number}", "source": source, "split": split, "official_split": split,
            "group_id": f"{source}-g{number}", "name_before": f"{number}_a.jpg", "name_after": f"{number}_b.jpg",
            "hash_before": f"{number}-b", "hash_after": f"{number}-a", "phash_before": int(rng.integers(2**62)) << 1,
            "phash_after": int(rng.integers(2**62)) << 1} | values


def table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    values = pd.DataFrame(rows)
    return values.astype({"phash_before": "uint64", "phash_after": "uint64"})


def must_not_decode(labels: NDArray[np.int64], sides: NDArray[np.int64]) -> NDArray[np.uint8]:
    raise AssertionError("this test needs no thumbnails, so no image may be decoded")


def random_table(seed: int, count: int = 211) -> pd.DataFrame:
    """Return random rows with few different values, so that many rows are equal or have hashes that differ slightly."""
    rng = np.random.default_rng(seed)
    bases = rng.integers(2**62, size=5)
    rows = []
    for number in range(count):
        names = rng.integers(count, size=2)
        noisy = [int(bases[rng.integers(5)]) ^ sum(1 << int(bit) for bit in rng.integers(62, size=2)) for _ in range(2)]
        rows.append(row(number, SPLITS[rng.integers(4)], source=("web", "film", "drawn")[rng.integers(3)],
                        hash_before=f"h{rng.integers(2 * count)}", hash_after=f"h{rng.integers(2 * count)}",
                        phash_before=noisy[0], phash_after=noisy[1], group_id=f"g{rng.integers(3 * count)}",
                        name_before=f"{names[0] // 9}.jpg", name_after=f"{names[1] // 9}.jpg" if number % 7 else ""))
    values = table(rows)
    values.index = pd.Index(np.arange(count) * 3 + 1)  # The index has gaps, because quarantined rows are removed.
    return values


def grey_thumbnails(labels: NDArray[np.int64], sides: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Return a uniform dark grey thumbnail for each image, instead of reading the images from shards."""
    return np.stack([np.full(1024, (7 * label + 3 * side) % 11, dtype=np.uint8)
                     for label, side in zip(labels, sides, strict=True)])


def slow_equal(rows: pd.DataFrame) -> dict[str, set[str]]:
    """Return the ids of the leaking pairs by reason, by comparing each pair with all pairs of later splits."""
    records, leaks = rows.to_dict("records"), {}
    values = {
        "equal image": lambda pair: {pair["hash_before"], pair["hash_after"]} - {""},
        "equal group": lambda pair: {pair["group_id"]},
        "equal published names": lambda pair: {(pair["source"], pair["name_before"], pair["name_after"])
                                               for _ in [0] if pair["name_before"] and pair["name_after"]}}
    for reason, values_of in values.items():
        leaks[reason] = {
            pair["pair_id"] for pair in records
            if any(values_of(pair) & values_of(other) and SPLITS.index(other["split"]) > SPLITS.index(pair["split"])
                   for other in records)}
    return leaks


def slow_near(rows: pd.DataFrame, bits: int) -> dict[str, float]:
    """Return the distance to the nearest image of a later split for each pair with a near-duplicate.

    Images are near-duplicates if their perceptual hashes differ in at most `bits` bits.
    """
    images = [(str(pair["pair_id"]), SPLITS.index(pair["split"]), int(pair[f"phash_{side}"]),
               grey_thumbnails(np.array([label]), np.array([number]))[0].astype(int))
              for label, pair in rows.iterrows() for number, side in enumerate(("before", "after"))]
    distances: dict[str, float] = {}
    for pair_id, rank, phash, pixels in images:
        for _, other_rank, other_phash, other_pixels in images:
            if other_rank > rank and (phash ^ other_phash).bit_count() <= bits:
                distance = float(np.abs(pixels - other_pixels).mean())
                distances[pair_id] = min(distance, distances.get(pair_id, 999.0))
    return distances


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_leaks_by_equal_values_equal_a_comparison_of_all_pairs(seed: int) -> None:
    rows = random_table(seed)
    leaks = find_leaks(rows, REPORT_ONLY, must_not_decode)
    expected = slow_equal(rows)
    assert all(expected.values())
    for reason, pairs in expected.items():
        lines = leaks[leaks["reason"] == reason]
        assert set(lines["pair_id"]) == pairs
        assert all(SPLITS.index(line["partner_split"]) > SPLITS.index(line["split"]) for _, line in lines.iterrows())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_near_duplicates_equal_a_comparison_of_all_images(seed: int) -> None:
    rows = random_table(seed).assign(name_before="")
    rows = rows.assign(group_id=rows["pair_id"], hash_before=rows["pair_id"] + "b", hash_after=rows["pair_id"] + "a")
    settings = Leaks(action="drop", near_bits=3, max_distance={"web": 2.0, "film": None})
    leaks = find_leaks(rows, settings, grey_thumbnails).set_index("pair_id")
    expected = slow_near(rows, 3)
    assert set(leaks.index) == set(expected)
    for pair_id, line in leaks.iterrows():
        is_measured = line["source"] != "drawn"
        assert line["distance"] == expected[str(pair_id)] if is_measured else np.isnan(line["distance"])
        assert line["leaks"] == (line["source"] == "web" and expected[str(pair_id)] <= 2.0)
    assert leaks["leaks"].any() and not leaks["leaks"].all()


def test_near_train_images_equal_a_bit_by_bit_reference() -> None:
    rows = random_table(3)
    expected: dict[str, dict[str, set[str]]] = {}
    train = [int(rows.loc[label, f"phash_{side}"]) for label in rows.index[rows["split"] == "train"]
             for side in ("before", "after")]
    for pair in rows[rows["split"] != "train"].to_dict("records"):
        images = expected.setdefault(pair["source"], {}).setdefault(pair["split"], set())
        for side in ("before", "after"):
            if any((int(pair[f"phash_{side}"]) ^ phash).bit_count() <= 3 for phash in train):
                images.add(pair["pair_id"] + side)
    counts = near_train_images(rows.assign(hash_before=rows["pair_id"] + "b", hash_after=rows["pair_id"] + "a"), bits=3)
    assert counts == {source: {split: len(images) for split, images in splits.items()}
                      for source, splits in expected.items()}


def test_the_pair_of_the_earlier_split_leaks_and_a_test_pair_never_does() -> None:
    rows = table([row(0, "train", hash_after="x"), row(1, "val", hash_before="x"), row(2, "gate"),
                  row(3, "test", hash_after="x"), row(4, "test", hash_before="x"), row(5, "gate", group_id="web-g1")])
    leaks = find_leaks(rows, REPORT_ONLY, must_not_decode)
    assert leaks[["pair_id", "reason", "partner", "partner_split"]].values.tolist() == [
        ["web-0", "equal image", "web-3", "test"], ["web-1", "equal image", "web-3", "test"],
        ["web-1", "equal group", "web-5", "gate"]]
    assert leaks["leaks"].all()


def test_two_pairs_without_images_and_names_are_not_equal() -> None:
    empty = {"hash_before": "", "hash_after": "", "phash_before": 0, "phash_after": 0, "name_before": ""}
    rows = table([row(0, "train", **empty), row(1, "test", **empty)])
    assert find_leaks(rows, MEASURED, must_not_decode).empty
    assert near_train_images(rows, bits=3) == {}


def test_equal_file_names_in_different_sources_are_not_a_leak() -> None:
    names = {"name_before": "1.jpg", "name_after": "2.jpg"}
    rows = table([row(0, "train", **names), row(1, "test", "film", **names), row(2, "train", "film", **names)])
    assert find_leaks(rows, REPORT_ONLY, must_not_decode)["pair_id"].tolist() == ["film-2"]


def test_all_pairs_that_contain_the_near_duplicate_leak() -> None:
    rows = table([row(0, "train", hash_before="x", phash_before=5), row(1, "train", hash_before="x", phash_before=5),
                  row(2, "test", "film", phash_after=4)])
    leaks = find_leaks(rows, MEASURED, lambda labels, sides: np.zeros((len(labels), 1024), dtype=np.uint8))
    assert leaks[["pair_id", "partner", "distance", "leaks"]].values.tolist() == [
        ["web-0", "film-2", 0.0, True], ["web-1", "film-2", 0.0, True]]


def published(split: str, uids: range, names: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """Return the probe rows of an official split of Image-Editing-Request whose images are missing."""
    no_images = {"hash_before": "", "hash_after": "", "phash_before": 0, "phash_after": 0, "official_split": split}
    splits = {"train": "train", "test": "test"}
    return [row(uid, splits.get(split, ("val", "gate")[uid % 2]), "image_editing_request", name_before=before,
                name_after=after, **no_images) for uid, (before, after) in zip(uids, names, strict=True)]


def test_the_known_leaks_of_image_editing_request_are_found_by_file_name() -> None:
    # The official splits train, val and test have 3,061, 383 and 495 requests for 2,507, 357 and 446 image pairs.
    def pairs(start: int, count: int) -> list[tuple[str, str]]:
        return [(f"{number}_img0.jpg", f"{number}_img1.png") for number in range(start, start + count)]

    test = pairs(0, 446)
    val = test[:55] + pairs(1000, 302)
    train = [*val[100:102], test[400], *pairs(2000, 2504)]
    rows = table(published("test", range(495), test + test[:49]) + published("val", range(500, 883), val + val[:26])
                 + published("train", range(1000, 4061), train + train[:554]))
    assert shared_names(rows) == {"image_editing_request": {"test-val": 55, "train-val": 2, "train-test": 1}}
    leaks = find_leaks(rows, REPORT_ONLY, must_not_decode)
    remaining = rows[~rows["pair_id"].isin(leaks["pair_id"])]
    assert (remaining["split"] == "test").sum() == 495
    names = {split: set(zip(part["name_before"], part["name_after"], strict=True))
             for split, part in remaining.groupby("split")}
    assert not any(names[one] & names[other] for one in SPLITS for other in SPLITS if one < other)


@pytest.mark.skipif(not CASES.is_dir(), reason=f"the folder {CASES} does not exist")
def test_three_real_pairs_that_are_copied_to_another_split_leak() -> None:
    entries = json.loads((CASES / "image_editing_request_valid_first100.json").read_text())
    names = [(entry["img0"], entry["img1"]) for entry in entries]
    rows = table(published("val", range(100), names) + published("train", range(100, 103), names[:3]))
    assert shared_names(rows)["image_editing_request"]["train-val"] == len(set(names[:3]))
    assert set(find_leaks(rows, REPORT_ONLY, must_not_decode)["split"]) <= {"train", "val"}


def picture(seed: int, brighter: int = 0) -> Image.Image:
    cells = np.random.default_rng(seed).integers(40, 200, size=(9, 11, 3)).astype(np.uint8)
    return Image.fromarray(np.kron(cells + np.uint8(brighter), np.ones((13, 17, 1), dtype=np.uint8)))


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def test_each_thumbnail_is_computed_from_the_image_with_the_given_label_and_side(tmp_path: Path) -> None:
    records = [Record(f"p{k}", "web", "train", f"g{k}", encoded(picture(2 * k)), encoded(picture(2 * k + 1)), ["a"],
                      "?", "none", {}) for k in range(83)]
    write_shards(records[:70], tmp_path / "a", "train", shard_pairs=67)
    write_shards(records[70:], tmp_path / "b", "train", shard_pairs=67)
    labels, sides = np.array([82, 3, 66, 67, 3, 70]), np.array([0, 1, 0, 1, 0, 1])
    folders = [tmp_path / "a", tmp_path / "b"]
    thumbnails = read_thumbnails(folders, labels, sides, max_megapixels=1, runtime=Runtime(workers=2))
    expected = [thumbnail(picture(2 * int(label) + int(side))) for label, side in zip(labels, sides, strict=True)]
    assert np.array_equal(thumbnails, np.stack(expected))


def test_a_leak_is_refused_and_a_near_duplicate_that_is_only_reported_is_accepted() -> None:
    rows = table([row(0, "train", hash_after="x"), row(1, "gate", hash_before="x")])
    with pytest.raises(ValueError, match=r"1 pairs also occur in a later split \(first: web-0 in train and web-1 in "
                                         r"gate: equal image\); remove these pairs, or set data\.leaks\.action to"):
        refuse_leaks(find_leaks(rows, REPORT_ONLY, must_not_decode), report=Path("leaks.parquet"))
    near = table([row(0, "train", phash_after=1), row(1, "gate", phash_before=1)])
    leaks = find_leaks(near, REPORT_ONLY, must_not_decode)
    assert leaks["reason"].tolist() == ["near-duplicate image"]
    refuse_leaks(leaks, report=Path("leaks.parquet"))
