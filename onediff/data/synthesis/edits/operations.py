"""The operations: each takes a random stream and a picture and returns an edit."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from onediff.data.synthesis.edits.pictures import PLACES, Picture, Pixels, draw_thing, draw_uniform
from onediff.data.synthesis.phrases import pick
from onediff.data.synthesis.render import Thing, View, bounding_box, render

CASTS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0), "purple": (1, 0, 1),
         "cyan": (0, 1, 1)}
TURNS = {"to the left": 1, "to the right": -1}  # quarter turns counter-clockwise


@dataclass(frozen=True)
class Edit:
    """What came of it: pixels, the word for {new}, the object for {old}, its rectangle in pixels."""

    after: Pixels
    new: str | None = None
    thing: Thing | None = None
    region: list[int] | None = None


def brighten(rng: Generator, picture: Picture) -> Edit:
    x = picture.pixels / 255
    return Edit(_pixels(255 * x * (1 + float(rng.uniform(0.7, 1.0)) * (1 - x))))  # a gain that never saturates


def darken(rng: Generator, picture: Picture) -> Edit:
    return Edit(_pixels(picture.pixels * float(rng.uniform(0.35, 0.55))))


def change_contrast(rng: Generator, picture: Picture, *, low: float, high: float) -> Edit:
    """Multiplies the distance of each value from the mean by a factor between `low` and `high`."""
    mean = int(picture.pixels.sum(dtype=np.int64)) / picture.pixels.size  # a sum of integers is the same everywhere
    return Edit(_pixels(mean + (picture.pixels - mean) * float(rng.uniform(low, high))))


def color_cast(rng: Generator, picture: Picture) -> Edit:
    name = pick(rng, tuple(CASTS))
    cast = np.array(CASTS[name], dtype=np.float64)
    shift = cast - float(cast @ np.array([0.299, 0.587, 0.114]))  # colour without brightness
    return Edit(_pixels(picture.pixels + shift * float(rng.uniform(60, 85))), new=name)


def black_and_white(rng: Generator, picture: Picture) -> Edit:
    return Edit(np.array(Image.fromarray(picture.pixels).convert("L").convert("RGB")))


def blur(rng: Generator, picture: Picture) -> Edit:
    radius = float(rng.uniform(0.018, 0.028)) * picture.pixels.shape[0]
    return Edit(np.array(Image.fromarray(picture.pixels).filter(ImageFilter.GaussianBlur(radius))))


def crop(rng: Generator, picture: Picture) -> Edit:
    """Half to two thirds of each side, at the named border or in the middle, back at full size."""
    side, place = picture.pixels.shape[0], pick(rng, tuple(PLACES))
    spare = side - round(side * float(rng.uniform(0.5, 0.66)))
    x = {"left": 0, "right": spare}.get(place, spare // 2)
    y = {"top": 0, "bottom": spare}.get(place, spare // 2)
    box = (x, y, x + side - spare, y + side - spare)
    after = Image.fromarray(picture.pixels).resize((side, side), Image.Resampling.BICUBIC, box=box)
    return Edit(np.array(after), new=place, region=list(box))


def rotate(rng: Generator, picture: Picture) -> Edit:
    turn = pick(rng, tuple(TURNS))
    return Edit(np.ascontiguousarray(np.rot90(picture.pixels, TURNS[turn])), new=turn)


def remove(rng: Generator, picture: Picture) -> Edit:
    """A canvas is rendered without its first thing; in a photograph an ellipse is filled from around it."""
    from skimage.restoration import inpaint_biharmonic

    side = picture.pixels.shape[0]
    if picture.view:
        after, _ = render(list(picture.things[1:]), picture.view, side)
        _, ids = render(list(picture.things), picture.view, side, samples=1)
        return Edit(after, new=picture.place, thing=picture.things[0], region=bounding_box(ids == 0))
    place = pick(rng, tuple(PLACES))
    half = round(side * float(rng.uniform(0.12, 0.15)))
    x, y = _draw_middle(rng, place, side, half=half + 3)
    window = (slice(y - half - 3, y + half + 3), slice(x - half - 3, x + half + 3))
    ring = (np.arange(2 * half + 6) + 0.5 - half - 3) ** 2
    mask = ring[:, None] + ring[None, :] < half * half
    after = picture.pixels.copy()
    after[window] = _pixels(255 * inpaint_biharmonic(picture.pixels[window] / 255, mask, channel_axis=2))
    return Edit(after, new=place, region=[x - half, y - half, x + half, y + half])


def paste(rng: Generator, picture: Picture) -> Edit:
    """A rendered thing, cut out along its outline, laid over the picture."""
    place, side = pick(rng, tuple(PLACES)), picture.pixels.shape[0]
    half = round(side * float(rng.uniform(0.16, 0.22)))
    thing = replace(draw_thing(rng, 0.0, 0.0), size="small")  # its middle is then where the camera looks
    distance = thing.half * {"cube": 6.4, "sphere": 4.5, "cylinder": 5.6}[thing.shape]  # fills the frame
    light_azimuth, light_elevation = draw_uniform(rng, (-1.0, 0.6), (0.8, 1.0))
    view = View(0.0, 0.5, distance, 0.0, 0.0, light_azimuth, light_elevation, light_power=0.75, ambient=0.35)
    pixels, ids = render([thing], view, 4 * half, samples=1)
    shown = (ids == 0).astype(np.float64)[..., None]
    fine = np.concatenate([pixels * shown, shown], axis=2)  # colour times alpha in 0 to 255, and alpha
    mean = (fine[::2, ::2] + fine[1::2, ::2] + fine[::2, 1::2] + fine[1::2, 1::2]) / 4  # a smooth outline
    x, y = _draw_middle(rng, place, side, half=half)
    after, region = picture.pixels.copy(), [x - half, y - half, x + half, y + half]
    window = (slice(y - half, y + half), slice(x - half, x + half))
    after[window] = _pixels(mean[..., :3] + (1 - mean[..., 3:]) * after[window])
    return Edit(after, new=place, thing=thing, region=region)


def _draw_middle(rng: Generator, place: str, side: int, *, half: int) -> tuple[int, int]:
    """The middle (x, y) of a square at `place` that lies inside the picture, in pixels."""
    u, v = (middle + float(rng.uniform(-0.1, 0.1)) for middle in PLACES[place])
    x, y = round(side * (1 + u) / 2), round(side * (1 - v) / 2)
    return min(max(x, half), side - half), min(max(y, half), side - half)


def change_nothing(rng: Generator, picture: Picture) -> Edit:
    return Edit(picture.pixels)


def _pixels(values: NDArray[np.floating[Any]]) -> Pixels:
    return np.floor(np.clip(values, 0, 255) + 0.5).astype(np.uint8)


OPERATIONS: dict[str, Callable[[Generator, Picture], Edit]] = {
    "brighten": brighten, "darken": darken, "more_contrast": partial(change_contrast, low=1.8, high=2.5),
    "less_contrast": partial(change_contrast, low=0.3, high=0.5), "color_cast": color_cast,
    "black_and_white": black_and_white, "blur": blur, "crop": crop, "rotate": rotate, "remove": remove, "paste": paste,
    "none": change_nothing,
}
