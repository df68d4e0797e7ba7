from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from onediff.config import Config
from onediff.data.synthesis.phrases import SYNONYMS
from onediff.data.synthesis.render import Thing
from onediff.data.synthesis.scenes.captions import describe, name_objects
from onediff.data.synthesis.scenes.drawing import Change, draw_view
from onediff.data.synthesis.scenes.records import CHANGE_TYPES, scene_records

RED = Thing("cube", "red", "big", "matte", -1.0, 0.0, 0.0)


def moved(thing: Thing, **changes: object) -> Thing:
    return Thing(**(vars(thing) | changes))


def test_a_seed_gives_the_same_bytes(micro: Config) -> None:
    assert scene_records(micro, "test", 3) == scene_records(micro, "test", 3)
    assert scene_records(micro, "test", 3)[0].before != scene_records(micro, "gate", 3)[0].before


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_base_scene_gives_changed_reversed_and_distractor_pairs(micro: Config, split: str) -> None:
    for index, kind in enumerate(CHANGE_TYPES):
        records = scene_records(micro, split, index)
        types = [record.change_type for record in records]
        inverse = {"add": "drop", "drop": "add"}.get(kind, kind)
        assert types == [kind, inverse] + ["none"] * (1 if split == "train" else 2)
        assert len({record.pair_id for record in records}) == len(records)
        assert len({record.group_id for record in records}) == 1
        assert all(len(set(record.references)) == 3 for record in records)


def test_the_swap_of_a_test_pair_has_the_two_images_in_reverse_order(micro: Config) -> None:
    changed, swap, *_ = scene_records(micro, "test", 0)
    assert (swap.before, swap.after) == (changed.after, changed.before)
    assert swap.provenance["swap_of"] == changed.pair_id
    assert swap.provenance["new"] == changed.provenance["object"]["color"]


def test_the_two_images_of_a_distractor_differ(micro: Config) -> None:
    for record in scene_records(micro, "test", 1)[2:]:
        assert record.before != record.after
        assert record.provenance["object"] is None


def test_the_region_contains_the_changed_object(micro: Config) -> None:
    for index in range(5):
        record = scene_records(micro, "test", index)[0]
        box = record.provenance["region_before"] or record.provenance["region_after"]
        left, top, right, bottom = box
        assert 0 <= left < right <= 96
        assert 0 <= top < bottom <= 96
        assert (right - left) * (bottom - top) >= micro.data.scenes.min_visible * 96 * 96
        side = record.before if record.provenance["region_before"] else record.after
        assert np.asarray(Image.open(io.BytesIO(side))).shape == (96, 96, 3)


def test_references_contain_color_and_shape_of_the_changed_object(micro: Config) -> None:
    for index in range(25):
        for record in scene_records(micro, "train", index)[:2]:
            thing = record.provenance["object"]
            for reference in record.references:
                assert thing["color"] in reference
                assert any(word in reference for word in SYNONYMS[thing["shape"]])


def fits(phrase: str, thing: Thing) -> bool:
    """Whether the attributes that a phrase without a neighbour names are the thing's."""
    return all(any(word in SYNONYMS.get(getattr(thing, name), (getattr(thing, name),))
                   for name in ("shape", "color", "size", "material"))
               for word in phrase.split())


def test_a_description_without_a_neighbour_fits_exactly_one_object() -> None:
    scene = [RED, moved(RED, size="small", x=1.0), moved(RED, material="shiny", y=1.5), moved(RED, color="blue", x=2.0)]
    for seed in range(40):
        rng = np.random.default_rng(seed)
        for thing in scene:
            phrase = describe(rng, thing, scene)
            assert phrase is not None
            assert [other for other in scene if fits(phrase, other)] == [thing], phrase


def test_equal_objects_are_distinguished_by_a_neighbour() -> None:
    ball = Thing("sphere", "green", "small", "matte", 0.0, 0.0, 0.0)
    scene = [RED, moved(RED, x=1.4), ball]
    phrases = {describe(np.random.default_rng(seed), scene[0], scene) for seed in range(20)}
    assert all(" left of the green " in str(phrase) for phrase in phrases)
    assert describe(np.random.default_rng(0), RED, [RED, moved(RED, x=1.4)]) is None


def test_the_inverse_of_the_inverse_is_the_change() -> None:
    for change in (Change("color", RED, moved(RED, color="blue")), Change("add", None, RED), Change("drop", RED, None),
                   Change("move", RED, moved(RED, x=1.0), "right"), Change("none", None, None)):
        assert change.inverse.inverse == change
    assert Change("move", RED, moved(RED, x=1.0), "right").inverse.direction == "left"
    assert Change("add", None, RED).inverse.change_type == "drop"


def test_an_image_caption_lists_the_objects_from_left_to_right() -> None:
    scene = [moved(RED, x=1.5), moved(RED, x=-1.5, color="blue", shape="sphere", material="shiny")]
    view = draw_view(np.random.default_rng(0), 0.0)
    assert name_objects(scene, view) == "a big blue shiny sphere, a big red matte cube"


def test_settings_that_allow_no_clear_scene_are_an_error(micro: Config) -> None:
    scenes = micro.data.scenes.model_copy(update={"min_visible": 0.5})
    config = micro.model_copy(update={"data": micro.data.model_copy(update={"scenes": scenes})})
    message = r"data.scenes: \d+ random scenes have no clearly visible change; lower max_objects or min_visible"
    with pytest.raises(ValueError, match=message):
        scene_records(config, "train", 0)
