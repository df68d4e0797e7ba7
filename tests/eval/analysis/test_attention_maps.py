from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from onediff.config import Config
from onediff.data.record import Record
from onediff.data.synthesis.scenes.records import scene_records
from onediff.eval.analysis.attention_maps import (
    attention_figures,
    maps_of_records,
    points_inside,
    region_figures,
    regions,
)
from onediff.inputs.boxes import coverage, on_the_grid
from onediff.model.assemble import build
from onediff.model.attention import AttentionMaps, attention_maps, pixel_change
from onediff.model.captioner import Captioner


def captioner(micro: Config, *, reading: str = "C", pool: int = 2, **delta: Any) -> Captioner:
    """Return the untrained model of the micro preset with the given settings of the Visual Delta Module."""
    settings = micro.model.model_copy(update={"reading": reading, "patch_pool": pool,
                                              "delta": micro.model.delta.model_copy(update=delta)})
    return Captioner(*build(settings, seed=7))


def test_the_maps_of_a_pair_do_not_depend_on_the_batch(micro: Config, scene_pairs: list[Record]) -> None:
    model = captioner(micro)
    for record, together in maps_of_records(model, scene_pairs[:3]):
        alone = attention_maps(model, [tuple(Image.open(io.BytesIO(image)) for image in record.images)])[0]
        assert np.allclose(alone.before, together.before, atol=1e-6)
        assert np.allclose(alone.after, together.after, atol=1e-6)


@pytest.mark.parametrize("size", [(96, 96), (192, 96), (60, 150)])
def test_a_box_of_an_image_of_any_shape_covers_the_patches_that_show_it(micro: Config, size: tuple[int, int]) -> None:
    box = [size[0] // 2, size[1] // 4, size[0] // 2 + size[0] // 4, size[1] // 4 + size[1] // 4]
    before, after = (np.zeros((size[1], size[0], 3), dtype=np.uint8) for _ in range(2))
    after[box[1] : box[3], box[0] : box[2]] = 255
    images = captioner(micro).processor.pixels([Image.fromarray(pixels) for pixels in (before, after)])
    change = pixel_change(images[None], side=8)[0]
    box_on_grid = on_the_grid(box, size, side=8)
    inside = coverage(box_on_grid, side=8)
    assert points_inside(change, box_on_grid)
    assert (change * inside).sum() > 0.8 * change.sum() * inside.max()
    assert np.allclose(change / change.max(), inside / inside.max(), atol=0.25)


def row(change_type: str, **where: Any) -> dict[str, Any]:
    return {"change_type": change_type, "provenance": where}


def test_each_image_has_a_separate_region() -> None:
    move = row("move", region_before=[1, 2, 3, 4], region_after=[5, 6, 7, 8])
    assert regions(move) == {"before": [1, 2, 3, 4], "after": [5, 6, 7, 8]}
    assert regions(row("add", region_before=None, region_after=[5, 6, 7, 8])) == {"after": [5, 6, 7, 8]}
    assert regions(row("paste", region=[1, 2, 3, 4])) == {"before": [1, 2, 3, 4], "after": [1, 2, 3, 4]}
    assert regions(row("crop", region=[1, 2, 3, 4])) == regions(row("blur", region=None)) == regions(row("none")) == {}
    assert regions(row("unlabelled")) == {}


def test_scenes_have_figures_only_for_the_images_that_show_the_changed_object(micro: Config) -> None:
    records = [record for index in range(5) for record in scene_records(micro, "test", index)]
    images = [image for record, maps in maps_of_records(captioner(micro), records)
              for image in region_figures(record, maps)]
    sides = {(image.change_type, image.side) for image in images}
    assert ("add", "after") in sides and ("add", "before") not in sides and ("none", "before") not in sides
    assert {("move", "before"), ("move", "after"), ("drop", "before")} <= sides
    got = attention_figures(images)
    assert got["num_images"] == len(images) == sum(kind["num_images"] for kind in got["by_change_type"].values())
    assert 0 < got["area_share"] < 0.2 and got["intervals"]["inside_share"][0] <= got["inside_share"]
    assert {"level_2_inside_share", "level_4_pointing_accuracy"} <= got.keys()


def test_uniform_attention_gives_the_share_of_the_area_and_attention_to_the_region_gives_1(
        scene_pairs: list[Record]) -> None:
    record = replace(scene_pairs[0], change_type="move", provenance={"region_before": None,
                                                                     "region_after": [12, 24, 36, 36]})
    flat, point = np.full((8, 8), 1 / 128), np.zeros((8, 8))
    point[2, 1] = 0.5
    for grid, share, pointing in ((flat, 2 / 64, 0.0), (point, 1.0, 1.0)):
        maps = AttentionMaps(before=flat, after=grid, levels={4: np.stack([flat, grid])}, change=flat)
        got = attention_figures(region_figures(record, maps))
        assert (got["inside_share"], got["pointing_accuracy"]) == (pytest.approx(share), pointing)
        assert got["area_share"] == got["difference_inside_share"] == pytest.approx(2 / 64)
        assert got["attention_share"] == pytest.approx(0.5)
        assert got["level_4_inside_share"] == got["inside_share"]
        assert (got["pointing_ceiling"], got["centre_pointing_accuracy"]) == (1, 0)


def test_no_patch_center_is_in_a_region_smaller_than_a_patch(scene_pairs: list[Record]) -> None:
    flat = np.full((8, 8), 1 / 128)
    maps = AttentionMaps(before=flat, after=flat, levels={}, change=flat)
    record = replace(scene_pairs[0], change_type="move", provenance={"region_after": [11, 11, 17, 17]})
    assert attention_figures(region_figures(record, maps))["pointing_ceiling"] == 0
    assert attention_figures([]) == {}
