from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from profiles import ADOBE_RGB, rgb_profile

from onediff.data.record import SPLITS
from onediff.data.synthesis.edits.photographs import PHOTOS, SCENE_OF, augment, draw_window, photo_paths, split_of


def test_each_photograph_of_the_packages_is_in_one_split_with_the_other_image_of_its_stereo_pair() -> None:
    names = [name for photos in PHOTOS.values() for name in photos]
    paths = [path for split in SPLITS for path in photo_paths(split, None).values()]
    assert len(names) == len(set(names)) == len(set(paths)) == 22
    assert all(path.is_file() for path in paths)
    assert len(PHOTOS["test"]) >= 8
    assert min(len(PHOTOS["val"]), len(PHOTOS["gate"])) >= 4
    assert set(SCENE_OF) <= set(PHOTOS["gate"])
    # The committed backbones saw these photographs.
    assert {"astronaut", "coffee", "hubble_deep_field", "china"} <= set(PHOTOS["train"])


def test_photographs_of_two_splits_show_different_pixels() -> None:
    small = {path: np.array(Image.open(path).convert("L").resize((16, 16))).astype(float)
             for split in SPLITS for path in photo_paths(split, None).values() if "motorcycle" not in path.name}
    for path, pixels in small.items():
        assert min(np.abs(pixels - other).mean() for name, other in small.items() if name != path) > 4


@pytest.mark.parametrize("size", [(96, 96), (96, 55), (55, 96), (300, 131)])
def test_a_window_has_the_size_that_was_asked_for(size: tuple[int, int]) -> None:
    for seed in range(6):
        picture = draw_window(np.random.default_rng(seed), "val", None, size=size)
        assert picture.size == size
        assert picture.name in PHOTOS["val"]


def test_augmented_photographs_differ_and_keep_their_content() -> None:
    start = draw_window(np.random.default_rng(1), "train", None, size=(64, 48)).pixels
    several = [augment(np.random.default_rng(seed), start) for seed in range(40)]
    assert 2 < sum(np.array_equal(pixels, start) for pixels in several) < 20
    grey = start.mean(axis=2).ravel()
    alike = [max(abs(np.corrcoef(grey, turned.mean(axis=2).ravel())[0, 1]) for turned in (pixels, pixels[::-1]))
             for pixels in several]
    assert min(alike) > 0.7


def test_file_names_decide_the_splits_of_a_folder_of_photographs(tmp_path: Path) -> None:
    for k in range(60):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{k}.png")
    parts = {split: set(photo_paths(split, str(tmp_path))) for split in SPLITS}
    assert sum(len(names) for names in parts.values()) == len(set().union(*parts.values())) == 60
    assert all(split_of(name) == split for split, names in parts.items() for name in names)


def test_a_missing_folder_and_a_split_without_photographs_are_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data\.edits\.photos: the folder .* does not exist"):
        photo_paths("train", str(tmp_path / "gone"))
    with pytest.raises(ValueError, match=r"none of the 0 photographs in .* falls into split 'val'"):
        photo_paths("val", str(tmp_path))


def test_a_color_profile_does_not_change_the_pixels_that_are_drawn(tmp_path: Path) -> None:
    windows = []
    for folder, profile in ((tmp_path / "with", rgb_profile(ADOBE_RGB, 2.2)), (tmp_path / "without", None)):
        folder.mkdir()
        for name, path in photo_paths("val", None).items():
            Image.open(path).convert("RGB").save(folder / f"{name}.png", icc_profile=profile)
        split = split_of("rocket.png")
        windows.append(draw_window(np.random.default_rng(3), split, str(folder), size=(96, 64)).pixels)
    assert np.array_equal(*windows)
