"""Canvases: rendered tables with objects, with a random ground, to which edits are applied."""

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from onediff.data.synthesis.edits.generated import PATTERNS
from onediff.data.synthesis.edits.pictures import PLACES, Picture, Pixels, Size, draw_uniform, to_pixels
from onediff.data.synthesis.phrases import pick
from onediff.data.synthesis.render import COLORS, FOV, MATERIALS, SHAPES, SIZES, Camera, Thing, View, render


def draw_canvas(rng: Generator, size: Size) -> Picture:
    """Draw and render a table with two to five objects, of which the first is at a named position such as "left"."""
    bounds = (-0.1, 0.1), (0.58, 0.66), (-1.0, 0.6), (0.8, 1.0), (0.5, 0.7), (0.25, 0.38)
    azimuth, elevation, *light = draw_uniform(rng, *bounds)
    view = View(azimuth, elevation, 11.0, 0.0, 0.0, *light)
    place = pick(rng, tuple(PLACES))
    count = int(rng.integers(2, 6))
    things: list[Thing] = []
    while len(things) < count:
        x, y = draw_uniform(rng, (-2.4, 2.4), (-2.4, 3.0)) if things else _draw_point(rng, view, place, size)
        thing = draw_thing(rng, x, y)
        if all((x - other.x) ** 2 + (y - other.y) ** 2 > (thing.half + other.half + 0.5) ** 2 for other in things):
            things.append(thing)
    ground = draw_ground(rng, size)
    pixels, _ = render_canvas(things, view, ground)
    return Picture("canvas", pixels, "canvas", tuple(things), view, place, ground)


def _draw_point(rng: Generator, view: View, place: str, size: Size) -> tuple[float, float]:
    """Return a point (x, y) of the table that the camera sees at the named position `place` of the image."""
    camera, longer = Camera.of(view), max(size)
    u, v = (FOV * side / longer * (middle + float(rng.uniform(-0.1, 0.1)))
            for middle, side in zip(PLACES[place], size, strict=True))
    ray = [camera.forward[i] + u * camera.right[i] + v * camera.up[i] for i in range(3)]
    reach = (0.6 - camera.eye[2]) / ray[2]  # The middle of an object is about 0.6 above the table.
    return camera.eye[0] + reach * ray[0], camera.eye[1] + reach * ray[1]


def draw_thing(rng: Generator, x: float, y: float) -> Thing:
    """Return an object with random attributes at the point (x, y) of the table."""
    return Thing(pick(rng, SHAPES), pick(rng, tuple(COLORS)), pick(rng, tuple(SIZES)), pick(rng, MATERIALS), x, y,
                 float(rng.uniform(0.0, 1.5)))


def draw_ground(rng: Generator, size: Size) -> NDArray[np.float64]:
    """Draw the factors (height, width, 3) by which the gray table of a canvas is multiplied.

    A third of the tables stay gray, a third get one color, and a third a weak pattern.
    """
    kind = int(rng.integers(3))
    tint = rng.uniform(0.6, 1.25, 3) if kind else np.ones(3)
    if kind < 2:
        return np.broadcast_to(tint, (size[1], size[0], 3))
    pattern = PATTERNS[pick(rng, tuple(PATTERNS))](rng, size).astype(np.float64)
    return tint * (1 + float(rng.uniform(0.1, 0.35)) * (pattern / 127.5 - 1))


def render_canvas(things: list[Thing], view: View, ground: NDArray[np.float64]) -> tuple[Pixels, NDArray[np.int8]]:
    """Render the objects on the colored table; return the image (height, width, 3) and the ids (height, width).

    The ids contain the index of the object that each pixel shows, or -1 for the table.
    """
    height, width = ground.shape[:2]
    side = max(height, width)
    pixels, ids = render(things, view, side)
    top, left = (side - height) // 2, (side - width) // 2
    window = slice(top, top + height), slice(left, left + width)
    shown, ids = pixels[window], np.ascontiguousarray(ids[window])
    return to_pixels(np.where((ids < 0)[:, :, None], shown * ground, shown)), ids
