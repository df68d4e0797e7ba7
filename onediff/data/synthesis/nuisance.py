"""Nuisance: differences between the images of a pair that are no change, such as noise, compression and light.

The caption of a pair stays true when its images are disturbed, because the section data.nuisance of params.yaml limits
each disturbance: what is weaker than the limit is nothing, and what is stronger than the limits of an edit is an edit.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from onediff.config import Nuisance
from onediff.inputs.images import jpeg, open_image

Pixels = NDArray[np.uint8]
# The probability of each kind in a disturbed image; noise and compression are the most frequent ones in practice.
KINDS = {"light": 0.4, "blur": 0.3, "shift": 0.3, "resampling": 0.3, "noise": 0.6, "jpeg": 0.6}
_BOTH = 0.7  # the probability that noise, compression and resampling disturb both images of a pair alike
_BEST_QUALITY = 96  # the JPEG quality of a disturbance of strength zero


@dataclass(frozen=True)
class Disturbance:
    """The strengths with which one image is disturbed; the default values leave the image unchanged.

    `light` is a factor, `blur_px` a radius, `shift_px` the distances to the right and downward, `resampling` the factor
    by which the image is reduced before it is enlarged again, and `noise` a standard deviation in grey levels.
    """

    light: float = 1.0
    blur_px: float = 0.0
    shift_px: tuple[float, float] = (0.0, 0.0)
    resampling: float = 1.0
    noise: float = 0.0
    jpeg_quality: int | None = None


def disturb(rng: Generator, pixels: Pixels, limits: Nuisance, *, strength: float = 1.0) -> Pixels:
    """Disturb one image (height, width, 3) at random; `strength` from 0 to 1 scales the limits."""
    return apply(rng, pixels, draw(rng, limits, strength=strength))


def draw(rng: Generator, limits: Nuisance, *, strength: float = 1.0, skip: Collection[str] = ()) -> Disturbance:
    """Draw the disturbance of one image; the kinds in `skip` do not occur."""
    chosen = {kind for (kind, probability), number in zip(KINDS.items(), rng.random(len(KINDS)), strict=True)
              if number < probability and kind not in skip}
    dark, bright = (1 + strength * (limit - 1) for limit in limits.light)
    light, blur, x, y, resampling, noise, quality = rng.random(7)
    reach, smallest = strength * limits.shift_px, 1 - strength * (1 - limits.resampling)
    lowest = _BEST_QUALITY - strength * (_BEST_QUALITY - limits.jpeg_quality)
    return Disturbance(
        light=float(dark + light * (bright - dark)) if "light" in chosen else 1.0,
        blur_px=float(blur * strength * limits.blur_px) if "blur" in chosen else 0.0,
        shift_px=(float((2 * x - 1) * reach), float((2 * y - 1) * reach)) if "shift" in chosen else (0.0, 0.0),
        resampling=float(smallest + resampling * (1 - smallest)) if "resampling" in chosen else 1.0,
        noise=float(noise * strength * limits.noise) if "noise" in chosen else 0.0,
        jpeg_quality=round(lowest + quality * (_BEST_QUALITY - lowest)) if "jpeg" in chosen else None)


def draw_pair(rng: Generator, limits: Nuisance, *, strength: float = 1.0,
              skip: Collection[str] = ()) -> tuple[Disturbance, Disturbance]:
    """Draw the disturbances of the two images of a pair.

    Light, blur and shift disturb only one of the images, so that the difference between the images is within the
    limits. Noise, compression and resampling usually disturb both images with equal strength, and otherwise one image.
    """
    first = draw(rng, limits, strength=strength, skip=skip)
    second = replace(first, light=1.0, blur_px=0.0, shift_px=(0.0, 0.0))
    if rng.random() >= _BOTH:
        second = Disturbance()
    return (first, second) if rng.random() < 0.5 else (second, first)


def apply(rng: Generator, pixels: Pixels, disturbance: Disturbance) -> Pixels:
    """Disturb an image (height, width, 3), in the order of a camera: light, optics, sensor, compression.

    The random generator is used only for the noise.
    """
    if disturbance.light != 1.0:
        pixels = _rounded(pixels * disturbance.light)
    image = Image.fromarray(pixels)
    if disturbance.blur_px:
        image = image.filter(ImageFilter.GaussianBlur(disturbance.blur_px))
    if disturbance.shift_px != (0.0, 0.0):
        image = _shifted(image, *disturbance.shift_px)
    if disturbance.resampling != 1.0:
        small = (round(image.width * disturbance.resampling), round(image.height * disturbance.resampling))
        image = image.resize(small, Image.Resampling.BICUBIC).resize(image.size, Image.Resampling.BICUBIC)
    if disturbance.noise:
        values = np.asarray(image, dtype=np.float64)
        image = Image.fromarray(_rounded(values + disturbance.noise * rng.standard_normal(values.shape)))
    if disturbance.jpeg_quality is not None:
        image = open_image(jpeg(image, quality=disturbance.jpeg_quality))
    return np.array(image)


def _shifted(image: Image.Image, x: float, y: float) -> Image.Image:
    """Shift an image by parts of a pixel; the border is filled by repeating the edge pixels."""
    reach = int(np.ceil(max(abs(x), abs(y))))
    padded = Image.fromarray(np.pad(np.asarray(image), ((reach, reach), (reach, reach), (0, 0)), mode="edge"))
    box = (reach - x, reach - y, reach - x + image.width, reach - y + image.height)
    return padded.resize(image.size, Image.Resampling.BICUBIC, box=box)


def _rounded(values: NDArray[np.floating[Any]]) -> Pixels:
    """Round color values to whole numbers between 0 and 255."""
    return np.floor(np.clip(values, 0, 255) + 0.5).astype(np.uint8)
