from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from onediff.config import Config
from onediff.data.record import SPLITS, Record
from onediff.data.synthesis.edits.photographs import PHOTOS, SCENE_OF, split_of
from onediff.data.synthesis.edits.records import DRAWN, SEED_TAG, edit_record, edit_records
from onediff.data.synthesis.phrases import EDIT_TEMPLATES, pick
from onediff.eval.analysis.grammar import parse_edit, says_the_edit, truth, undone_edit

PHOTOGRAPHS_ONLY = {"photograph": 1.0, "generated": 0.0, "canvas": 0.0}
Load = Callable[..., Config]


def pixels(content: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(content))).astype(int)


def test_records_have_unique_ids_complete_references_and_a_kind(some: list[Record]) -> None:
    assert len({record.pair_id for record in some}) == len(some)
    assert set(EDIT_TEMPLATES) == {record.change_type for record in some}
    for record in some:
        assert len(set(record.references)) == 3
        assert not any(re.search(r"[{}]|None|  ", reference) for reference in record.references)
        name, kind = record.provenance["photo"], record.provenance["kind"]
        place, _, rest = record.group_id.partition("/")
        if kind == "photograph":
            assert (place, rest) == ("photo", SCENE_OF.get(name, name))
        else:
            assert (place, kind) in {("canvas", "canvas"), ("generated", "generated")}


def test_every_reference_is_read_as_the_true_edit(some: list[Record]) -> None:
    for record in some:
        for reference in record.references:
            assert says_the_edit(parse_edit(reference), truth(vars(record))), reference


def test_half_of_the_pictures_are_not_square_and_the_longer_side_is_fixed(some: list[Record]) -> None:
    shapes = [[pixels(side).shape[:2] for side in (record.before, record.after)] for record in some]
    assert {max(shape) for pair in shapes for shape in pair} == {96}
    assert 0.35 < np.mean([pair[0][0] != pair[0][1] for pair in shapes]) < 0.65
    for record, (before, after) in zip(some, shapes, strict=True):
        assert after == (before[::-1] if record.change_type == "rotate" else before)


def test_a_pair_outside_of_train_is_followed_by_its_swapped_pair(edits_config: Load) -> None:
    for index in range(12):
        assert len(edit_records(edits_config(), "train", index)) == 1
        pair, *swapped = edit_records(edits_config(), "test", index)
        assert len(swapped) == (pair.change_type != "none")
        for swap in swapped:
            assert (swap.before, swap.after) == (pair.after, pair.before)
            assert (swap.pair_id, swap.provenance["swap_of"]) == (f"{pair.pair_id}s", pair.pair_id)
            assert swap.group_id == pair.group_id
            assert truth(vars(swap)) == undone_edit(truth(vars(pair)))
            assert swap.provenance["region_before"] == pair.provenance["region_after"]


def test_regions_are_inside_of_the_image_that_shows_the_object(some: list[Record]) -> None:
    with_region = Counter()
    for record in some:
        regions = {side: record.provenance[f"region_{side}"] for side in ("before", "after")}
        expected = {"paste": "after", "restore": "after", "remove": "before"}.get(record.change_type)
        assert [side for side, region in regions.items() if region] == ([expected] if expected else [])
        if expected:
            left, top, right, bottom = regions[expected]
            height, width = pixels(getattr(record, expected)).shape[:2]
            assert 0 <= left < right <= width
            assert 0 <= top < bottom <= height
            with_region[record.change_type] += 1
    assert min(with_region.values()) > 2


def test_every_edit_is_visible_and_unchanged_pairs_look_similar(some: list[Record]) -> None:
    for record in some:
        before, after = pixels(record.before), pixels(record.after)
        if before.shape != after.shape:
            continue
        delta = np.abs(before - after).max(axis=2)
        if record.change_type == "none":
            assert np.abs(before.mean() - after.mean()) < 0.2 * before.mean() + 3, record.pair_id
        else:
            assert (delta > 20).mean() > 0.01, record.pair_id


def test_unchanged_pairs_are_not_recognizable_by_equal_bytes(some: list[Record]) -> None:
    unchanged = [record for record in some if record.change_type == "none"]
    assert unchanged
    assert sum(record.before == record.after for record in unchanged) <= len(unchanged) // 3


def test_operations_are_about_equally_frequent() -> None:
    drawn = Counter(pick(np.random.default_rng([7, SEED_TAG, 0, index]), DRAWN) for index in range(1800))
    assert drawn.pop("none") > 140
    assert min(drawn.values()) > 70
    assert max(drawn.values()) < 135


def test_a_seed_gives_the_same_records_in_any_number_of_processes(some: list[Record], edits_config: Load) -> None:
    with ProcessPoolExecutor(2) as pool:
        again = list(pool.map(edit_record, [edits_config()] * 12, ["train"] * 12, range(12)))
    assert again == some[:12]


def test_another_seed_gives_other_records(some: list[Record], edits_config: Load) -> None:
    other = edits_config().model_copy(update={"seed": 8})
    assert edit_record(other, "train", 0).before != some[0].before


def test_pairs_show_only_photographs_of_their_split(some: list[Record]) -> None:
    for split in SPLITS:
        photos = {record.provenance["photo"] for record in some
                  if record.split == split and record.provenance["kind"] == "photograph"}
        assert photos
        assert photos <= set(PHOTOS[split])


def test_a_folder_of_photographs_replaces_those_of_the_packages(tmp_path: Path, edits_config: Load,
                                                                smooth: Callable[..., object]) -> None:
    for k in range(40):
        Image.fromarray(smooth(k).pixels).save(tmp_path / f"{k}.png")
    record = edit_record(edits_config(photos=str(tmp_path), shares=PHOTOGRAPHS_ONLY), "test", 0)
    assert split_of(record.group_id.removeprefix("photo/")) == "test"


def test_photographs_in_which_an_edit_is_invisible_are_an_error(tmp_path: Path, edits_config: Load) -> None:
    names = [name for name in (f"{k}.png" for k in range(40)) if split_of(name) == "train"]
    Image.new("RGB", (64, 64), "white").save(tmp_path / names[0])
    blurs = (index for index in range(199)
             if pick(np.random.default_rng([7, SEED_TAG, 0, index]), DRAWN) == "blur")
    with pytest.raises(ValueError, match="'blur' is invisible in 100 random windows"):
        edit_record(edits_config(photos=str(tmp_path), shares=PHOTOGRAPHS_ONLY), "train", next(blurs))
