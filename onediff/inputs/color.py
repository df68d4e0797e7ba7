"""Converts pixels with a color profile (ICC) to sRGB, the color space in which every image is compared."""

import functools
import io
from typing import Literal

import numpy as np
from PIL import Image, ImageCms

_MODES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab ": "LAB"}  # color space of a profile -> mode of Pillow
_NEAR = 1  # An image is not changed if its profile differs from sRGB by at most so many of the 256 levels.


class ProfileError(ValueError):
    """A color profile is broken, or does not fit the image."""


def to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Return an image of mode L, RGB, CMYK or LAB, whose colors `profile` defines, as RGB image in sRGB.

    The pixels do not change if the profile is that of sRGB. A grey image may have a profile for RGB. Raises
    ProfileError if the profile is broken or does not fit the image.
    """
    mode, transform = _transform(profile)
    if image.mode != mode and (image.mode, mode) != ("L", "RGB"):
        raise ProfileError(f"the color profile is for {mode}, but the image is {image.mode}")
    if image.mode != mode:
        image = image.convert(mode)
    return transform.apply(image) if transform else image.convert("RGB")


def lab_to_srgb(image: Image.Image) -> Image.Image:
    """Return an image of mode LAB without a color profile as RGB image in sRGB."""
    return ImageCms.ImageCmsTransform(_profile("LAB"), _profile("sRGB"), "LAB", "RGB").apply(image)


@functools.lru_cache(maxsize=16)
def _transform(profile: bytes) -> tuple[str, ImageCms.ImageCmsTransform | None]:
    """Return the mode of images with this profile, and the conversion to sRGB: None if the profile is that of sRGB."""
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = _MODES[opened.profile.xcolor_space]
        # Without this flag, the darkest grey levels are up to 10 levels wrong.
        transform = ImageCms.ImageCmsTransform(opened, _profile("sRGB"), mode, "RGB",
                                               flags=ImageCms.Flags.HIGHRESPRECALC)
    except (OSError, ValueError, KeyError):
        raise ProfileError("the color profile cannot be read") from None
    if mode in ("L", "RGB"):
        levels = np.arange(0, 256, 5, dtype=np.uint8)  # from black to white, which is 255
        grid = levels[None] if mode == "L" else np.stack(np.meshgrid(levels, levels, levels), -1).reshape(1, -1, 3)
        colors = Image.fromarray(grid)
        converted, same = np.asarray(transform.apply(colors), np.int16), np.asarray(colors.convert("RGB"), np.int16)
        if np.abs(converted - same).max() <= _NEAR:
            return mode, None
    return mode, transform


def _profile(name: Literal["LAB", "sRGB"]) -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile(name))
