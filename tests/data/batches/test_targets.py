from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from onediff.data.batches.targets import facts_of, targets_of
from onediff.data.record import Record
from onediff.inputs.attributes import CLASSES
from onediff.inputs.images import png
from onediff.inputs.processing import IGNORED

PLACES = 4
ATTRIBUTES = {"color": ["red", "blue", "gray"], "change_type": ["none", "move"], "result": ["left", "right"]}


def record(change_type: str, size: tuple[int, int] = (96, 96), **provenance: Any) -> Record:
    """Return a pair of plain images with this change type and provenance."""
    image = png(Image.new("RGB", size))
    return Record("p", "scenes", "train", "g", image, image, ["a"], "b", change_type, provenance)


def test_the_shares_of_known_boxes() -> None:
    move = record("move", region_before=[0, 24, 36, 48], region_after=[60, 48, 96, 72], new="left",
                  object={"color": "blue", "x": 0.3})
    targets = targets_of([facts_of(move)], ATTRIBUTES, places=PLACES)
    before, after = targets["place_targets"].unflatten(2, (PLACES, PLACES))[0]
    assert before.tolist() == [[0, 0, 0, 0], [1, 0.5, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert after.tolist() == [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0.5, 1], [0, 0, 0, 0]]
    assert targets["changed_targets"].tolist() == [1]
    assert targets["object_targets"].tolist() == [[1, 1, 0]]


def test_a_box_of_a_wide_image_counts_in_the_padded_square() -> None:
    paste = record("paste", (96, 48), region_before=None, region_after=[0, 0, 48, 24])
    shares = targets_of([facts_of(paste)], ATTRIBUTES, places=PLACES)["place_targets"][0].unflatten(1, (PLACES, PLACES))
    assert not shares[0].any()
    assert_close(shares[1], torch.tensor([[0.0] * 4, [1, 1, 0, 0], [0] * 4, [0] * 4]))


def test_an_unchanged_pair_has_empty_regions() -> None:
    targets = targets_of([facts_of(record("none", object=None, new=None))], ATTRIBUTES, places=PLACES)
    assert not targets["place_targets"].any() and targets["changed_targets"].tolist() == [0]
    # The last number means that the change has no such attribute.
    assert targets["object_targets"].tolist() == [[3, 0, 2]]


@pytest.mark.parametrize(("change_type", "provenance"), [
    ("blur", {"region_before": None, "region_after": None}), ("rotate", {"new": "to the left"}),
    ("crop", {"region_before": [1, 2, 30, 40], "region_after": None}),
    ("zoom_out", {"region_before": None, "region_after": [1, 2, 30, 40]})])
def test_edits_of_the_whole_picture_have_no_places(change_type: str, provenance: dict[str, Any]) -> None:
    targets = targets_of([facts_of(record(change_type, **provenance))], CLASSES, places=PLACES)
    assert (targets["place_targets"] == IGNORED).all() and targets["changed_targets"].tolist() == [1]
    known = dict(zip(CLASSES, targets["object_targets"][0].tolist(), strict=True))
    assert known["change_type"] == CLASSES["change_type"].index(change_type)


def test_nothing_is_known_about_a_published_pair_without_labels() -> None:
    targets = targets_of([facts_of(record("unlabelled", url="a"))], CLASSES, places=PLACES)
    assert all((value == IGNORED).all() for value in targets.values())


@pytest.mark.parametrize(("change_type", "new", "result"), [
    ("color", "cyan", "cyan"), ("texture", "shiny", "shiny"), ("color_cast", "red", "red"), ("move", "front", "front"),
    ("rotate", "to the right", "right"), ("paste", "top", "top"), ("crop", "left", "left")])
def test_the_result_of_a_change_is_one_word(change_type: str, new: str, result: str) -> None:
    facts = facts_of(record(change_type, new=new, region_before=[0, 0, 9, 9]))
    assert facts["attributes"] == {"change_type": change_type, "result": result}
    assert result in CLASSES["result"]


def test_a_class_that_is_not_in_the_list_is_ignored() -> None:
    targets = targets_of([facts_of(record("color", new="pink", object={"color": "blue"}))], ATTRIBUTES, places=PLACES)
    assert targets["object_targets"].tolist() == [[1, IGNORED, IGNORED]]


def test_every_generated_scene_has_targets_at_the_place_of_its_change(scene_pairs: list[Record]) -> None:
    facts = [facts_of(pair) for pair in scene_pairs]
    targets = targets_of(facts, CLASSES, places=12)
    assert targets["place_targets"].shape == (len(facts), 2, 144) and (targets["place_targets"] >= 0).all()
    assert targets["changed_targets"].tolist() == [pair.change_type != "none" for pair in scene_pairs]
    for pair, shares in zip(scene_pairs, targets["place_targets"], strict=True):
        for side, share in zip(("before", "after"), shares, strict=True):
            box = pair.provenance[f"region_{side}"] if pair.change_type != "none" else None
            area = (box[2] - box[0]) * (box[3] - box[1]) if box else 0
            width = Image.open(io.BytesIO(pair.before)).width
            assert share.sum() / 144 == pytest.approx(area / width**2, abs=1e-5)


def test_no_pair_gives_empty_targets(scene_pairs: list[Record]) -> None:
    targets = targets_of([], ATTRIBUTES, places=PLACES)
    assert [value.shape[0] for value in targets.values()] == [0, 0, 0]
    assert facts_of(replace(scene_pairs[0], change_type=""))["changed"] is None
