from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageCms
from profiles import ADOBE_RGB, SRGB, cmyk_profile, grey_profile, rgb_profile

from onediff.inputs.color import ProfileError, lab_to_srgb, to_srgb
from onediff.inputs.images import decode, open_image, png


def picture() -> Image.Image:
    """Return a picture of moderate colors, which every color space of the tests contains."""
    values = np.random.default_rng(3).uniform(70, 180, (5, 7, 3)).astype(np.uint8)
    return Image.fromarray(values).resize((53, 37), Image.Resampling.BICUBIC)


def linear(values: np.ndarray) -> np.ndarray:
    """Return the light of sRGB values from 0 to 255, by the formula of the standard."""
    share = values / 255
    return np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)


def in_adobe_rgb(image: Image.Image) -> Image.Image:
    light = np.linalg.solve(ADOBE_RGB, SRGB @ linear(np.asarray(image, np.float64)).reshape(-1, 3).T).T
    return Image.fromarray((255 * light.clip(0, 1) ** (1 / 2.2) + 0.5).astype(np.uint8).reshape(37, 53, 3))


def distance(one: Image.Image, other: Image.Image) -> float:
    return float(np.abs(np.asarray(one, np.int16) - np.asarray(other, np.int16)).mean())


def saved(image: Image.Image, kind: str, profile: bytes, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, icc_profile=profile, **options)
    return file.getvalue()


@pytest.mark.parametrize(("kind", "options"), [
    ("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True}), ("JPEG", {"quality": 100, "subsampling": 0}),
    ("AVIF", {"quality": 100, "subsampling": "4:4:4"})])
def test_a_picture_in_a_wide_color_space_equals_the_picture_in_srgb(kind: str, options: dict[str, object]) -> None:
    wide = in_adobe_rgb(picture())
    assert distance(wide, picture()) > 4
    file = saved(wide, kind, rgb_profile(ADOBE_RGB, 2.2), **options)
    assert distance(open_image(file), picture()) < (1 if kind in ("JPEG", "AVIF") else 0.6)


def test_transparent_pixels_become_white_and_the_other_pixels_are_converted() -> None:
    wide = in_adobe_rgb(picture())
    wide.putalpha(Image.linear_gradient("L").resize(wide.size).point(lambda value: 255 * (value > 100)))
    pixels = np.asarray(open_image(saved(wide, "PNG", rgb_profile(ADOBE_RGB, 2.2))), np.int16)
    assert (pixels[:10] == 255).all()
    assert np.abs(pixels[-10:] - np.asarray(picture(), np.int16)[-10:]).mean() < 0.6


def test_the_profile_of_srgb_changes_no_pixel() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert open_image(saved(picture(), "PNG", profile)).tobytes() == picture().tobytes()
    assert open_image(png(picture())).tobytes() == picture().tobytes()


def test_an_opened_image_has_no_profile_that_a_copy_of_it_would_get() -> None:
    copy = png(open_image(saved(in_adobe_rgb(picture()), "PNG", rgb_profile(ADOBE_RGB, 2.2))))
    assert "icc_profile" not in Image.open(io.BytesIO(copy)).info
    assert distance(open_image(copy), picture()) < 0.6


@pytest.mark.parametrize("bits", [8, 16])
def test_a_grey_profile_is_converted(bits: int) -> None:
    values = np.arange(256).reshape(1, 256).repeat(37, axis=0)
    grey = Image.fromarray(values.astype(np.uint8)) if bits == 8 else Image.fromarray((257 * values).astype(np.uint16))
    pixels = np.asarray(open_image(saved(grey, "PNG", grey_profile(1.8))), np.float64)
    share = (values[..., None] / 255) ** 1.8
    expected = 255 * np.where(share <= 0.0031308, 12.92 * share, 1.055 * share ** (1 / 2.4) - 0.055)
    assert np.abs(pixels - expected).max() < 1.1


def test_a_grey_image_may_have_a_profile_for_rgb() -> None:
    wide = np.asarray(open_image(saved(picture().convert("L"), "PNG", rgb_profile(ADOBE_RGB, 1.8))))
    assert (wide == wide[..., :1]).all()
    assert distance(Image.fromarray(wide), picture().convert("L").convert("RGB")) > 5


def test_a_cmyk_profile_decides_the_colors_of_ink() -> None:
    red = Image.new("CMYK", (53, 37), (0, 255, 255, 0))
    pixels = np.asarray(open_image(saved(red, "TIFF", cmyk_profile())), np.int16)
    assert np.ptp(pixels) <= 4, "the inks of this printer are grey"
    assert 90 < pixels.mean() < 170


def test_a_lab_image_is_converted() -> None:
    lab = Image.new("LAB", (53, 37), (255, 128, 128))
    assert np.asarray(lab_to_srgb(lab)).min() >= 250
    file = io.BytesIO()
    lab.save(file, "TIFF")
    assert np.asarray(open_image(file.getvalue())).min() >= 250


@pytest.mark.parametrize(("profile", "note"), [
    (b"no profile", "the color profile cannot be read"), (grey_profile(2.2), "is for L, but the image is RGB"),
    (cmyk_profile(), "is for CMYK, but the image is RGB"), (rgb_profile(ADOBE_RGB, 2.2)[:200], "cannot be read")])
def test_a_profile_that_cannot_be_used_is_ignored_and_noted(profile: bytes, note: str) -> None:
    decoded = decode(saved(picture(), "PNG", profile))
    assert decoded.image.tobytes() == picture().tobytes()
    assert len(decoded.notes) == 1 and note in decoded.notes[0] and "taken as sRGB" in decoded.notes[0]
    with pytest.raises(ProfileError, match=note):
        to_srgb(picture(), profile)
