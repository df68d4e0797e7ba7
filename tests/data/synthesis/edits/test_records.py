from __future__ import annotations

import io
import re
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from ruamel.yaml import YAML

from onediff.config import Config
from onediff.data.record import SPLITS, Record
from onediff.data.synthesis.edits.operations import OPERATIONS, brighten, paste, rotate
from onediff.data.synthesis.edits.pictures import PHOTOS, PLACES, Picture, photo_paths, split_of
from onediff.data.synthesis.edits.records import SEED_TAG, edit_record
from onediff.data.synthesis.phrases import EDIT_TEMPLATES, pick

ROOT = Path(__file__).parents[4]


def config(**changes: object) -> Config:
    values = YAML(typ="safe").load((ROOT / "presets/tiny.yaml").read_text())
    values["data"]["edits"] |= changes
    return Config.model_validate(values)


def pixels(content: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(content))).astype(int)


def picture(seed: int = 3, side: int = 97) -> Picture:
    """Smooth random colours, so that every operation shows."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(30, 220, (7, 7, 3)).astype(np.uint8))
    return Picture("random", np.array(coarse.resize((side, side), Image.Resampling.BICUBIC)))


@pytest.fixture(scope="module")
def some() -> list[Record]:
    return [edit_record(config(), split, index) for split in SPLITS for index in range(40)]


def test_brightness_and_contrast_operations_equal_a_pixel_by_pixel_reference() -> None:
    start = picture(side=11)
    for operation, formula in {
        "darken": lambda x, mean, k: x * k,
        "less_contrast": lambda x, mean, k: mean + (x - mean) * k,
    }.items():
        bounds = {"darken": (0.35, 0.55), "less_contrast": (0.3, 0.5)}[operation]
        strength = np.random.default_rng(5).uniform(*bounds)
        after = OPERATIONS[operation](np.random.default_rng(5), start).after
        mean = start.pixels.mean()
        for (row, column, channel), value in np.ndenumerate(start.pixels):
            assert abs(after[row, column, channel] - formula(value, mean, strength)) <= 0.51


def test_brighten_darkens_no_pixel_and_keeps_black_and_white() -> None:
    ramp = Picture("ramp", np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2))
    after = brighten(np.random.default_rng(1), ramp).after[0, :, 0].astype(int)
    assert (after[0], after[255]) == (0, 255)
    assert (np.diff(after) >= 0).all()
    assert after[80] > 80 * 1.4


def test_a_rotation_to_the_left_is_counter_clockwise() -> None:
    marked = np.zeros((96, 96, 3), dtype=np.uint8)
    marked[:10] = 255  # along the top
    for seed in range(9):
        edit = rotate(np.random.default_rng(seed), Picture("marked", marked))
        border = edit.after[:, :10] if edit.new == "to the left" else edit.after[:, -10:]
        assert (border == 255).all()


@pytest.mark.parametrize("operation", ["paste", "remove", "crop"])
def test_the_edited_region_is_at_the_position_in_the_caption(operation: str) -> None:
    seen = set()
    for seed in range(30):
        edit = OPERATIONS[operation](np.random.default_rng(seed), picture(seed))
        assert edit.region is not None
        x0, y0, x1, y1 = edit.region
        u, v = (x0 + x1) / 97 - 1, 1 - (y0 + y1) / 97
        assert 0 <= x0 < x1 <= 97
        assert 0 <= y0 < y1 <= 97
        assert edit.new == min(PLACES, key=lambda name: np.hypot(u - PLACES[name][0], v - PLACES[name][1]))
        seen.add(edit.new)
    assert seen == set(PLACES)


def test_paste_and_remove_change_no_pixel_outside_the_region() -> None:
    for operation in ("paste", "remove"):
        start = picture(7)
        edit = OPERATIONS[operation](np.random.default_rng(2), start)
        x0, y0, x1, y1 = edit.region or (0, 0, 0, 0)
        changed = (edit.after != start.pixels).any(axis=2)
        inside = changed[y0:y1, x0:x1]
        assert changed.sum() == inside.sum()
        assert 0.2 < inside.mean() < 0.95  # along its outline, and not as a rectangle


def test_a_pasted_object_is_complete() -> None:
    for seed in range(60):
        rng = np.random.default_rng(seed)
        edit = paste(rng, Picture("black", np.zeros((96, 96, 3), dtype=np.uint8)))
        x0, y0, x1, y1 = edit.region or (0, 0, 0, 0)
        window = edit.after[y0:y1, x0:x1].max(axis=2)
        border = np.concatenate([window[0], window[-1], window[:, 0], window[:, -1]])
        assert border.max() == 0, edit.thing
        assert (window > 0).mean() > 0.3


def test_records_have_unique_ids_equal_sizes_and_complete_references(some: list[Record]) -> None:
    assert len({record.pair_id for record in some}) == len(some)
    assert set(EDIT_TEMPLATES) == {record.change_type for record in some} == set(OPERATIONS)
    for record in some:
        assert pixels(record.before).shape == pixels(record.after).shape == (96, 96, 3)
        assert len(set(record.references)) == 3
        assert not any(re.search(r"[{}]|None|  ", reference) for reference in record.references)
        kind, _, name = record.group_id.partition("/")
        assert (kind, record.provenance["photo"]) in {("canvas", "canvas"), ("photo", name)}


def test_every_edit_is_visible_and_unchanged_pairs_look_equal(some: list[Record]) -> None:
    for record in some:
        delta = np.abs(pixels(record.before) - pixels(record.after)).max(axis=2)
        if record.change_type == "none":
            assert delta.mean() < 12, record.pair_id
        else:
            assert (delta > 20).mean() > 0.01, record.pair_id


def test_unchanged_pairs_are_not_recognizable_by_equal_bytes(some: list[Record]) -> None:
    unchanged = [record for record in some if record.change_type == "none"]
    assert unchanged
    assert sum(record.before == record.after for record in unchanged) <= len(unchanged) // 3


def test_operations_are_about_equally_frequent() -> None:
    drawn = Counter(
        str(pick(np.random.default_rng([7, SEED_TAG, 0, index]), tuple(EDIT_TEMPLATES)))
        for index in range(1200)
    )
    assert min(drawn.values()) > 60
    assert max(drawn.values()) < 150


def test_a_seed_gives_the_same_records_in_any_number_of_processes(some: list[Record]) -> None:
    with ProcessPoolExecutor(2) as pool:
        again = list(pool.map(edit_record, [config()] * 12, ["train"] * 12, range(12)))
    assert again == some[:12]


def test_another_seed_gives_other_records(some: list[Record]) -> None:
    other = config().model_copy(update={"seed": 8})
    assert edit_record(other, "train", 0).before != some[0].before


def test_no_photograph_is_in_two_splits(some: list[Record]) -> None:
    names = [name for photos in PHOTOS.values() for name in photos]
    assert len(names) == len(set(names)) == 8
    for split in SPLITS:
        photos = {record.provenance["photo"] for record in some if record.split == split} - {"canvas"}
        assert photos <= set(PHOTOS[split])
        assert all(path.is_file() for path in photo_paths(split, None).values())


def test_file_names_decide_the_splits_of_a_folder_of_photographs(tmp_path: Path) -> None:
    for k in range(60):
        Image.fromarray(picture(k).pixels).save(tmp_path / f"{k}.png")
    parts = {split: set(photo_paths(split, str(tmp_path))) for split in SPLITS}
    assert sum(len(names) for names in parts.values()) == len(set().union(*parts.values())) == 60
    assert all(split_of(name) == split for split, names in parts.items() for name in names)
    record = edit_record(config(photos=str(tmp_path), canvas_share=0.0), "test", 0)
    assert record.group_id.removeprefix("photo/") in parts["test"]


def test_a_missing_folder_and_a_split_without_photographs_are_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data\.edits\.photos: the folder .* does not exist"):
        photo_paths("train", str(tmp_path / "gone"))
    with pytest.raises(ValueError, match=r"none of the 0 photographs in .* falls into split 'val'"):
        photo_paths("val", str(tmp_path))


def test_photographs_in_which_an_edit_is_invisible_are_an_error(tmp_path: Path) -> None:
    names = [name for name in (f"{k}.png" for k in range(40)) if split_of(name) == "train"]
    Image.new("RGB", (64, 64), "white").save(tmp_path / names[0])
    blurs = (index for index in range(99)
             if pick(np.random.default_rng([7, SEED_TAG, 0, index]), tuple(EDIT_TEMPLATES)) == "blur")
    with pytest.raises(ValueError, match="'blur' is invisible in 100 random windows"):
        edit_record(config(photos=str(tmp_path), canvas_share=0.0), "train", next(blurs))
