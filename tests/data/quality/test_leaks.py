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
    rng = np.random.default_rng(number)
    return {"pair_id": f"{source}-{number}", "source": source, "split": split, "official_split": split,
            "group_id": f"{source}-g{number}", "name_before": f"{number}_a.jpg", "name_after": f"{number}_b.jpg",
            "hash_before": f"{number}-b", "hash_after": f"{number}-a", "phash_before": int(rng.integers(2**62)) << 1,
            "phash_after": int(rng.integers(2**62)) << 1} | values


def table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    values = pd.DataFrame(rows)
    return values.astype({"phash_before": "uint64", "phash_after": "uint64"})


def nothing(labels: NDArray[np.int64], sides: NDArray[np.int64]) -> NDArray[np.uint8]:
    raise AssertionError("no image needs to be decoded")


def many(seed: int, count: int = 211) -> pd.DataFrame:
    """Few values, so that much is equal; hashes that differ in few bits."""
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
    values.index = pd.Index(np.arange(count) * 3 + 1)  # as after a quarantine
    return values


def looks(labels: NDArray[np.int64], sides: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Stands for pictures: nearly the same grey all over, another one for each image."""
    return np.stack([np.full(1024, (7 * label + 3 * side) % 11, dtype=np.uint8)
                     for label, side in zip(labels, sides, strict=True)])


def slow_equal(rows: pd.DataFrame) -> dict[str, set[str]]:
    records, found = rows.to_dict("records"), {}
    values = {
        "equal image": lambda one: {one["hash_before"], one["hash_after"]} - {""},
        "equal group": lambda one: {one["group_id"]},
        "equal published names": lambda one: {(one["source"], one["name_before"], one["name_after"])
                                              for _ in [0] if one["name_before"] and one["name_after"]}}
    for reason, of in values.items():
        found[reason] = {one["pair_id"] for one in records
                         if any(of(one) & of(other) and SPLITS.index(other["split"]) > SPLITS.index(one["split"])
                                for other in records)}
    return found


def slow_near(rows: pd.DataFrame, bits: int) -> dict[str, float]:
    """Smallest distance of any image of a pair to an image of a later split that is within the bits."""
    images = [(str(one["pair_id"]), SPLITS.index(one["split"]), int(one[f"phash_{side}"]),
               looks(np.array([label]), np.array([number]))[0].astype(int))
              for label, one in rows.iterrows() for number, side in enumerate(("before", "after"))]
    found: dict[str, float] = {}
    for pair_id, rank, bits_of, seen in images:
        for _, other_rank, other, shown in images:
            if other_rank > rank and (bits_of ^ other).bit_count() <= bits:
                found[pair_id] = min(float(np.abs(seen - shown).mean()), found.get(pair_id, 999.0))
    return found


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_equal_values_are_found_as_by_comparing_every_pair_with_every_other(seed: int) -> None:
    rows = many(seed)
    found = find_leaks(rows, REPORT_ONLY, nothing)
    slow = slow_equal(rows)
    assert all(slow.values())
    for reason, pairs in slow.items():
        lines = found[found["reason"] == reason]
        assert set(lines["pair_id"]) == pairs
        assert all(SPLITS.index(one["partner_split"]) > SPLITS.index(one["split"]) for _, one in lines.iterrows())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_near_duplicates_are_those_of_comparing_every_image_with_every_other(seed: int) -> None:
    rows = many(seed).assign(name_before="")
    rows = rows.assign(group_id=rows["pair_id"], hash_before=rows["pair_id"] + "b", hash_after=rows["pair_id"] + "a")
    settings = Leaks(action="drop", near_bits=3, max_distance={"web": 2.0, "film": None})
    found = find_leaks(rows, settings, looks).set_index("pair_id")
    slow = slow_near(rows, 3)
    assert set(found.index) == set(slow)
    for pair_id, line in found.iterrows():
        measured = line["source"] != "drawn"
        assert line["distance"] == slow[str(pair_id)] if measured else np.isnan(line["distance"])
        assert line["leaks"] == (line["source"] == "web" and slow[str(pair_id)] <= 2.0)
    assert found["leaks"].any() and not found["leaks"].all()


def test_near_train_images_equal_a_bit_by_bit_reference() -> None:
    rows = many(3)
    slow: dict[str, dict[str, set[str]]] = {}
    train = [int(rows.loc[label, f"phash_{side}"]) for label in rows.index[rows["split"] == "train"]
             for side in ("before", "after")]
    for one in rows[rows["split"] != "train"].to_dict("records"):
        kept = slow.setdefault(one["source"], {}).setdefault(one["split"], set())
        for side in ("before", "after"):
            if any((int(one[f"phash_{side}"]) ^ other).bit_count() <= 3 for other in train):
                kept.add(one["pair_id"] + side)
    found = near_train_images(rows.assign(hash_before=rows["pair_id"] + "b", hash_after=rows["pair_id"] + "a"), bits=3)
    assert found == {source: {split: len(its) for split, its in splits.items()} for source, splits in slow.items()}


def test_the_lower_split_leaves_and_a_test_pair_never_does() -> None:
    rows = table([row(0, "train", hash_after="x"), row(1, "val", hash_before="x"), row(2, "gate"),
                  row(3, "test", hash_after="x"), row(4, "test", hash_before="x"), row(5, "gate", group_id="web-g1")])
    found = find_leaks(rows, REPORT_ONLY, nothing)
    assert found[["pair_id", "reason", "partner", "partner_split"]].values.tolist() == [
        ["web-0", "equal image", "web-3", "test"], ["web-1", "equal image", "web-3", "test"],
        ["web-1", "equal group", "web-5", "gate"]]
    assert found["leaks"].all()


def test_missing_images_and_names_are_equal_to_nothing() -> None:
    empty = {"hash_before": "", "hash_after": "", "phash_before": 0, "phash_after": 0, "name_before": ""}
    rows = table([row(0, "train", **empty), row(1, "test", **empty)])
    assert find_leaks(rows, MEASURED, nothing).empty
    assert near_train_images(rows, bits=3) == {}


def test_names_of_another_source_are_other_pictures() -> None:
    named = {"name_before": "1.jpg", "name_after": "2.jpg"}
    rows = table([row(0, "train", **named), row(1, "test", "film", **named), row(2, "train", "film", **named)])
    assert find_leaks(rows, REPORT_ONLY, nothing)["pair_id"].tolist() == ["film-2"]


def test_every_pair_that_shows_the_near_duplicate_leaves() -> None:
    rows = table([row(0, "train", hash_before="x", phash_before=5), row(1, "train", hash_before="x", phash_before=5),
                  row(2, "test", "film", phash_after=4)])
    found = find_leaks(rows, MEASURED, lambda labels, sides: np.zeros((len(labels), 1024), dtype=np.uint8))
    assert found[["pair_id", "partner", "distance", "leaks"]].values.tolist() == [
        ["web-0", "film-2", 0.0, True], ["web-1", "film-2", 0.0, True]]


def published(split: str, uids: range, names: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """Rows as a probe of Image-Editing-Request's annotations without images."""
    none = {"hash_before": "", "hash_after": "", "phash_before": 0, "phash_after": 0, "official_split": split}
    our = {"train": "train", "test": "test"}
    return [row(uid, our.get(split, ("val", "gate")[uid % 2]), "image_editing_request", name_before=before,
                name_after=after, **none) for uid, (before, after) in zip(uids, names, strict=True)]


def test_the_known_leaks_of_image_editing_request_are_found_by_name() -> None:
    # Official sizes: 3,061 / 383 / 495 requests over 2,507 / 357 / 446 different image pairs.
    def pairs(start: int, count: int) -> list[tuple[str, str]]:
        return [(f"{number}_img0.jpg", f"{number}_img1.png") for number in range(start, start + count)]

    test = pairs(0, 446)
    val = test[:55] + pairs(1000, 302)
    train = [*val[100:102], test[400], *pairs(2000, 2504)]
    rows = table(published("test", range(495), test + test[:49]) + published("val", range(500, 883), val + val[:26])
                 + published("train", range(1000, 4061), train + train[:554]))
    assert shared_names(rows) == {"image_editing_request": {"test-val": 55, "train-val": 2, "train-test": 1}}
    found = find_leaks(rows, REPORT_ONLY, nothing)
    left = rows[~rows["pair_id"].isin(found["pair_id"])]
    assert (left["split"] == "test").sum() == 495
    names = {split: set(zip(part["name_before"], part["name_after"], strict=True))
             for split, part in left.groupby("split")}
    assert not any(names[one] & names[other] for one in SPLITS for other in SPLITS if one < other)


@pytest.mark.skipif(not CASES.is_dir(), reason="shared/cases is not beside the project")
def test_a_real_excerpt_shares_no_pair_with_itself_but_with_a_copy_in_another_split() -> None:
    entries = json.loads((CASES / "image_editing_request_valid_first100.json").read_text())
    names = [(entry["img0"], entry["img1"]) for entry in entries]
    rows = table(published("val", range(100), names) + published("train", range(100, 103), names[:3]))
    assert shared_names(rows)["image_editing_request"]["train-val"] == len(set(names[:3]))
    assert set(find_leaks(rows, REPORT_ONLY, nothing)["split"]) <= {"train", "val"}


def picture(seed: int, brighter: int = 0) -> Image.Image:
    cells = np.random.default_rng(seed).integers(40, 200, size=(9, 11, 3)).astype(np.uint8)
    return Image.fromarray(np.kron(cells + np.uint8(brighter), np.ones((13, 17, 1), dtype=np.uint8)))


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def test_thumbnails_come_from_the_right_shard_row_and_side(tmp_path: Path) -> None:
    records = [Record(f"p{k}", "web", "train", f"g{k}", encoded(picture(2 * k)), encoded(picture(2 * k + 1)), ["a"],
                      "?", "none", {}) for k in range(83)]
    write_shards(records[:70], tmp_path / "a", "train", shard_pairs=67)
    write_shards(records[70:], tmp_path / "b", "train", shard_pairs=67)
    labels, sides = np.array([82, 3, 66, 67, 3, 70]), np.array([0, 1, 0, 1, 0, 1])
    folders = [tmp_path / "a", tmp_path / "b"]
    found = read_thumbnails(folders, labels, sides, max_megapixels=1, runtime=Runtime(workers=2))
    wanted = [thumbnail(picture(2 * int(label) + int(side))) for label, side in zip(labels, sides, strict=True)]
    assert np.array_equal(found, np.stack(wanted))


def test_a_leak_is_refused_by_name_and_reports_alone_pass() -> None:
    rows = table([row(0, "train", hash_after="x"), row(1, "gate", hash_before="x")])
    with pytest.raises(ValueError, match=r"1 pairs also occur in a later split \(first: web-0 in train and web-1 in "
                                         r"gate: equal image\); remove them, or set data\.leaks\.action to drop"):
        refuse_leaks(find_leaks(rows, REPORT_ONLY, nothing), report=Path("leaks.parquet"))
    near = table([row(0, "train", phash_after=1), row(1, "gate", phash_before=1)])
    found = find_leaks(near, REPORT_ONLY, nothing)
    assert found["reason"].tolist() == ["near-duplicate image"]
    refuse_leaks(found, report=Path("leaks.parquet"))
