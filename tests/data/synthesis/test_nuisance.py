from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFilter

from onediff.config import Config
from onediff.data.synthesis import nuisance
from onediff.data.synthesis.edits.photographs import draw_window
from onediff.data.synthesis.nuisance import KINDS, Disturbance, apply, disturb, draw, draw_pair


def photograph(seed: int = 3, size: tuple[int, int] = (96, 72)) -> nuisance.Pixels:
    return draw_window(np.random.default_rng(seed), "test", None, size=size).pixels


def strengths(disturbance: Disturbance) -> dict[str, bool]:
    """Return which kinds of disturbance are present."""
    fields = vars(disturbance)
    names = {"light": "light", "blur": "blur_px", "shift": "shift_px", "resampling": "resampling", "noise": "noise",
             "jpeg": "jpeg_quality"}
    return {kind: fields[name] != vars(Disturbance())[name] for kind, name in names.items()}


def test_the_default_disturbance_changes_nothing() -> None:
    pixels = photograph()
    assert np.array_equal(apply(np.random.default_rng(0), pixels, Disturbance()), pixels)


def test_every_kind_of_disturbance_occurs_within_its_limits(micro: Config) -> None:
    limits = micro.data.nuisance
    drawn = [draw(np.random.default_rng(seed), limits) for seed in range(300)]
    assert {kind for each in drawn for kind, present in strengths(each).items() if present} == set(KINDS)
    assert all(limits.light[0] <= each.light <= limits.light[1] for each in drawn)
    assert max(each.blur_px for each in drawn) <= limits.blur_px < limits.edit_blur_px
    assert max(abs(value) for each in drawn for value in each.shift_px) <= limits.shift_px
    assert 15 < max(each.noise for each in drawn) <= limits.noise
    assert limits.jpeg_quality <= min(each.jpeg_quality for each in drawn if each.jpeg_quality) < 35
    assert limits.resampling <= min(each.resampling for each in drawn)


def test_a_weaker_strength_draws_weaker_disturbances(micro: Config) -> None:
    drawn = [draw(np.random.default_rng(seed), micro.data.nuisance, strength=0.2) for seed in range(200)]
    assert max(each.noise for each in drawn) <= 0.2 * micro.data.nuisance.noise
    assert min(each.jpeg_quality for each in drawn if each.jpeg_quality) > 80
    assert all(0.97 <= each.light <= 1.04 for each in drawn)


def test_only_one_image_of_a_pair_has_another_light_and_skipped_kinds_do_not_occur(micro: Config) -> None:
    pairs = [draw_pair(np.random.default_rng(seed), micro.data.nuisance) for seed in range(200)]
    for kind in ("light", "blur", "shift"):
        sides = {tuple(strengths(each)[kind] for each in pair) for pair in pairs}
        assert sides == {(False, False), (True, False), (False, True)}
    assert {tuple(strengths(each)["noise"] for each in pair) for pair in pairs} == {
        (False, False), (True, False), (False, True), (True, True)}
    quiet = [draw_pair(np.random.default_rng(seed), micro.data.nuisance, skip=("light",)) for seed in range(50)]
    assert not any(strengths(each)["light"] for pair in quiet for each in pair)


@pytest.mark.parametrize("gain", [0.85, 1.18])
def test_light_multiplies_the_brightness(gain: float) -> None:
    pixels = np.minimum(photograph(), 200)
    lit = apply(np.random.default_rng(0), pixels, Disturbance(light=gain))
    assert lit.mean() / pixels.mean() == pytest.approx(gain, abs=0.01)


def test_no_disturbance_looks_like_a_blur_that_is_an_edit(micro: Config) -> None:
    limits = micro.data.nuisance
    radii = [float(radius) for radius in np.linspace(0.05, 1.5, 30)]
    for weak in (Disturbance(blur_px=limits.blur_px), Disturbance(resampling=limits.resampling)):
        for seed in range(5):
            pixels = photograph(seed)
            after = apply(np.random.default_rng(0), pixels, weak).astype(float)
            errors = [((after - np.array(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(radius)))) ** 2).mean()
                      for radius in radii]
            assert radii[int(np.argmin(errors))] < limits.edit_blur_px


def test_a_shift_of_whole_pixels_moves_the_picture() -> None:
    pixels = photograph()
    moved = apply(np.random.default_rng(0), pixels, Disturbance(shift_px=(1.0, -1.0)))
    assert np.array_equal(moved[:-1, 1:], pixels[1:, :-1])


def test_a_seed_gives_the_same_bytes(micro: Config) -> None:
    first, second, other = (disturb(np.random.default_rng(seed), photograph(), micro.data.nuisance)
                            for seed in (5, 5, 8))
    assert np.array_equal(first, second)
    assert first.shape == photograph().shape
    assert not np.array_equal(first, other)
