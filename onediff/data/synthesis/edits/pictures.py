"""The pictures to which edits are applied: what a picture consists of, its size, and the named positions in it."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from onediff.data.synthesis.render import Thing, View

Pixels = NDArray[np.uint8]
Size = tuple[int, int]  # width and height in pixels

# The middle (u, v) of each named position in an image: u from -1 (left) to 1 (right), v from -1 (bottom) to 1 (top).
PLACES = {"left": (-0.56, 0.0), "right": (0.56, 0.0), "top": (0.0, 0.56), "bottom": (0.0, -0.56), "center": (0.0, 0.0)}


@dataclass(frozen=True)
class Picture:
    """The picture to which an edit is applied.

    `kind` is "photograph", "generated" or "canvas" (a rendered table), and `name` is the name of the photograph or of
    the pattern. For a canvas, `things` are the objects, `view` is the camera with the light, `place` is the named
    position of the first object, and `ground` (height, width, 3) are the factors that color the table.
    """

    name: str
    pixels: Pixels
    kind: str = "photograph"
    things: tuple[Thing, ...] = ()
    view: View | None = None
    place: str | None = None
    ground: NDArray[np.float64] | None = None

    @property
    def size(self) -> Size:
        return self.pixels.shape[1], self.pixels.shape[0]


def draw_size(rng: Generator, image_px: int) -> Size:
    """Draw the size of a picture whose longer side has `image_px` pixels; half of all pictures are squares."""
    if rng.random() < 0.5:
        return image_px, image_px
    short = round(image_px * float(rng.uniform(0.56, 0.85)))  # 0.56 is the shape of a screen, 16 to 9.
    return (image_px, short) if rng.random() < 0.5 else (short, image_px)


def to_pixels(values: NDArray[np.floating[Any]]) -> Pixels:
    """Round color values to whole numbers between 0 and 255."""
    return np.floor(np.clip(values, 0, 255) + 0.5).astype(np.uint8)


def draw_uniform(rng: Generator, *bounds: tuple[float, float]) -> list[float]:
    """Draw a uniform random number between each pair of bounds."""
    return [float(rng.uniform(low, high)) for low, high in bounds]
