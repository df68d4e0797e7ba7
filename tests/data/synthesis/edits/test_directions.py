from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from onediff.config import Config
from onediff.data.synthesis.edits.canvases import draw_canvas
from onediff.data.synthesis.edits.directions import Change, draw_change
from onediff.data.synthesis.edits.pictures import Picture
from onediff.data.synthesis.phrases import EDIT_TEMPLATES
from onediff.eval.analysis.behaviour import Change as Claim
from onediff.eval.analysis.grammar import inverse_edit, parse_edit, says_the_edit, undone_edit


def changes(operation: str, picture: Picture, config: Config) -> list[Change]:
    """Return the clear changes among 30 random changes of the picture with this operation."""
    drawn = (draw_change(np.random.default_rng(seed), operation, picture, config.data.nuisance) for seed in range(30))
    return [change for change in drawn if change]


def claim(change: Change) -> Claim:
    thing = change.thing
    return Claim(change.operation, thing and thing.color, thing and thing.shape, thing and thing.size,
                 thing and thing.material, change.new)


def caption(change: Change, template: str) -> str:
    old = f"{change.thing.color} {change.thing.shape}" if change.thing else ""
    return template.format(old=old, new=change.new)


@pytest.mark.parametrize("operation", EDIT_TEMPLATES)
def test_a_reversed_edit_has_a_caption_that_is_read_as_the_inverse(operation: str, micro: Config,
                                                                   smooth: Callable[..., Picture]) -> None:
    canvas = draw_canvas(np.random.default_rng(1), (96, 64))
    drawn = changes(operation, smooth(), micro) + changes(operation, canvas, micro)
    assert len(drawn) > 5
    for change in drawn:
        back = change.inverse
        assert change.operation == operation
        assert back.inverse == change
        assert (back.before is change.after, back.after is change.before) == (True, True)
        assert (back.region_before, back.region_after) == (change.region_after, change.region_before)
        for template in EDIT_TEMPLATES[back.operation]:
            assert says_the_edit(parse_edit(caption(back, template)), claim(back))
        if operation != "none":
            assert undone_edit(claim(change)) == claim(back)
            texts = (caption(each, EDIT_TEMPLATES[each.operation][0]) for each in (change, back))
            assert inverse_edit(*map(parse_edit, texts))


def test_an_operation_with_a_way_back_is_generated_in_both_directions(micro: Config,
                                                                      smooth: Callable[..., Picture]) -> None:
    start = smooth()
    for operation in ("darken", "rotate", "remove", "less_contrast"):
        sides = {change.before is start.pixels for change in changes(operation, start, micro)}
        assert sides == {True, False}, operation
    assert {change.before is start.pixels for change in changes("sharpen", start, micro)} == {False}


def test_the_region_of_an_object_is_on_the_side_that_shows_it(micro: Config, smooth: Callable[..., Picture]) -> None:
    for operation, side in {"paste": "after", "restore": "after", "remove": "before"}.items():
        for change in changes(operation, smooth(), micro):
            regions = {"before": change.region_before, "after": change.region_after}
            assert [name for name, region in regions.items() if region] == [side]


def test_edits_of_the_brightness_are_outside_of_the_margin_and_edits_of_the_contrast_are_inside(
        micro: Config, smooth: Callable[..., Picture]) -> None:
    limits = micro.data.nuisance
    for seed in range(4):
        for operation in ("brighten", "darken", "more_contrast", "less_contrast"):
            for change in changes(operation, smooth(seed), micro):
                gain = change.after.mean() / change.before.mean()
                if operation == "brighten":
                    assert gain > limits.edit_light[1]
                elif operation == "darken":
                    assert gain < limits.edit_light[0]
                else:
                    assert limits.light[0] <= gain <= limits.light[1]


@pytest.mark.parametrize("operation", ["blur", "sharpen", "black_and_white", "crop", "less_contrast"])
def test_an_invisible_edit_is_refused(operation: str, micro: Config) -> None:
    white = Picture("white", np.full((64, 64, 3), 255, dtype=np.uint8))
    assert changes(operation, white, micro) == []
    assert changes("paste", white, micro)
