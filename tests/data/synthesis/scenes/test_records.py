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
from onediff.data.synthesis.scenes.records import CHANGE_TYPES, _draw_jitter, scene_records

RED = Thing("cube", "red", "big", "matte", -1.0, 0.0, 0.0)


def altered(thing: Thing, **changes: object) -> Thing:
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
    """Return whether all attributes in the phrase, which mentions no neighbour, are attributes of the object."""
    return all(any(word in SYNONYMS.get(getattr(thing, name), (getattr(thing, name),))
                   for name in ("shape", "color", "size", "material"))
               for word in phrase.split())


def test_a_description_without_a_neighbour_fits_exactly_one_object() -> None:
    scene = [RED, altered(RED, size="small", x=1.0), altered(RED, material="shiny", y=1.5),
             altered(RED, color="blue", x=2.0)]
    for seed in range(40):
        rng = np.random.default_rng(seed)
        for thing in scene:
            phrase = describe(rng, thing, scene)
            assert phrase is not None
            assert [other for other in scene if fits(phrase, other)] == [thing], phrase


def test_equal_objects_are_distinguished_by_a_neighbour() -> None:
    ball = Thing("sphere", "green", "small", "matte", 0.0, 0.0, 0.0)
    scene = [RED, altered(RED, x=1.4), ball]
    phrases = {describe(np.random.default_rng(seed), scene[0], scene) for seed in range(20)}
    assert all(" left of the green " in str(phrase) for phrase in phrases)
    assert describe(np.random.default_rng(0), RED, [RED, altered(RED, x=1.4)]) is None


def test_the_inverse_of_the_inverse_is_the_change() -> None:
    for change in (Change("color", RED, altered(RED, color="blue")), Change("add", None, RED),
                   Change("drop", RED, None), Change("move", RED, altered(RED, x=1.0), "right"),
                   Change("none", None, None)):
        assert change.inverse.inverse == change
    assert Change("move", RED, altered(RED, x=1.0), "right").inverse.direction == "left"
    assert Change("add", None, RED).inverse.change_type == "drop"


def test_an_image_caption_lists_the_objects_from_left_to_right() -> None:
    scene = [altered(RED, x=1.5), altered(RED, x=-1.5, color="blue", shape="sphere", material="shiny")]
    view = draw_view(np.random.default_rng(0), 0.0)
    assert name_objects(scene, view) == "a big blue shiny sphere, a big red matte cube"


def test_settings_that_allow_no_clear_scene_are_an_error(micro: Config) -> None:
    scenes = micro.data.scenes.model_copy(update={"min_visible": 0.5})
    config = micro.model_copy(update={"data": micro.data.model_copy(update={"scenes": scenes})})
    message = r"data.scenes: \d+ random scenes have no clearly visible change; lower max_objects or min_visible"
    with pytest.raises(ValueError, match=message):
        scene_records(config, "train", 0)


def test_training_scenes_draw_their_jitter_and_other_splits_have_one_jitter(micro: Config) -> None:
    def drawn(split: str, source: str) -> list[float]:
        return [_draw_jitter(np.random.default_rng(seed), micro.data.scenes, split, source) for seed in range(500)]

    training = drawn("train", "scenes")
    assert 0 < min(training) < 0.2
    assert 1.4 < max(training) <= micro.data.scenes.train_jitter < micro.data.scenes.far_jitter
    assert np.mean(training) == pytest.approx(1.0, abs=0.05)
    assert {*drawn("test", "scenes")} == {micro.data.scenes.jitter}
    assert {*drawn("test", "scenes_far")} == {micro.data.scenes.far_jitter}


def test_a_part_of_the_scenes_is_disturbed_and_the_captions_stay(micro: Config) -> None:
    def with_share(share: float) -> Config:
        limits = micro.data.nuisance.model_copy(update={"share": share})
        return micro.model_copy(update={"data": micro.data.model_copy(update={"nuisance": limits})})

    clean, noisy = (scene_records(with_share(share), "train", 3) for share in (0.0, 1.0))
    for first, second in zip(clean, noisy, strict=True):
        assert pixels(first.before).shape == pixels(second.before).shape == (96, 96, 3)
    repeated = scene_records(with_share(1.0), "test", 3)
    assert (repeated[1].before, repeated[1].after) == (repeated[0].after, repeated[0].before)
    table = [pixels(record.before)[:8, :8].astype(float) for record in noisy]
    smooth = [pixels(record.before)[:8, :8].astype(float) for record in clean]
    assert max(each.std() for each in table) > max(each.std() for each in smooth)


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)))
