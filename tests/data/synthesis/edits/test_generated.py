from __future__ import annotations

import numpy as np
import pytest

from onediff.data.synthesis.edits.generated import PATTERNS, draw_generated
from onediff.data.synthesis.edits.pictures import Picture, draw_size


@pytest.mark.parametrize("size", [(96, 54), (48, 96), (33, 33)])
@pytest.mark.parametrize("name", PATTERNS)
def test_a_pattern_has_the_size_and_is_neither_empty_nor_always_the_same(name: str, size: tuple[int, int]) -> None:
    several = [PATTERNS[name](np.random.default_rng(seed), size) for seed in range(5)]
    assert {Picture(name, pixels).size for pixels in several} == {size}
    assert min(pixels.astype(float).std(axis=(0, 1)).max() for pixels in several) > 2
    assert len({pixels.tobytes() for pixels in several}) == 5


def test_a_seed_gives_the_same_picture_and_all_patterns_occur() -> None:
    def draw(seed: int) -> Picture:
        return draw_generated(np.random.default_rng(seed), "train", None, size=(64, 48))

    several = [draw(seed) for seed in range(60)]
    assert {picture.name for picture in several} == {*PATTERNS, "collage"}
    assert {picture.kind for picture in several} == {"generated"}
    assert all(np.array_equal(draw(seed).pixels, several[seed].pixels) for seed in range(9))


def test_half_of_all_sizes_are_squares_and_the_longer_side_is_fixed() -> None:
    sizes = [draw_size(np.random.default_rng(seed), 96) for seed in range(400)]
    assert {max(size) for size in sizes} == {96}
    assert min(min(size) for size in sizes) >= 0.5 * 96
    squares = sum(width == height for width, height in sizes)
    wide = sum(width > height for width, height in sizes)
    assert 160 < squares < 240
    assert 60 < wide < 140
