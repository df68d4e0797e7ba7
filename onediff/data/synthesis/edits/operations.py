"""The edit operations: functions that draw the strength and position of an edit and apply it to a picture."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from onediff.data.synthesis.edits.canvases import draw_thing
from onediff.data.synthesis.edits.pictures import PLACES, Picture, Pixels, draw_uniform
from onediff.data.synthesis.phrases import pick
from onediff.data.synthesis.render import Thing, View, bounding_box, render

CASTS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0), "purple": (1, 0, 1),
         "cyan": (0, 1, 1)}
TURNS = {"to the left": 1, "to the right": -1}  # quarter turns counter-clockwise


@dataclass(frozen=True)
class Edit:
    """The result of an edit operation.

    `new` and `thing` fill the fields {new} and {old} of the caption templates. `region` is the edited rectangle
    [left, top, right, bottom] in pixels, if only a part of the picture was edited.
    """

    after: Pixels
    new: str | None = None
    thing: Thing | None = None
    region: list[int] | None = None


def brighten(rng: Generator, picture: Picture) -> Edit:
    """Make the picture brighter by a random amount."""
    x = picture.pixels / 255
    # The gain falls to 1 for white pixels, so that bright areas keep their detail.
    return Edit(_pixels(255 * x * (1 + float(rng.uniform(0.7, 1.0)) * (1 - x))))


def darken(rng: Generator, picture: Picture) -> Edit:
    """Make the picture darker by a random factor."""
    return Edit(_pixels(picture.pixels * float(rng.uniform(0.35, 0.55))))


def change_contrast(rng: Generator, picture: Picture, *, low: float, high: float) -> Edit:
    """Multiply the distance of each value from the mean by a random factor between `low` and `high`."""
    # A sum of integers, unlike a sum of floats, is equal on every machine.
    mean = int(picture.pixels.sum(dtype=np.int64)) / picture.pixels.size
    return Edit(_pixels(mean + (picture.pixels - mean) * float(rng.uniform(low, high))))


def color_cast(rng: Generator, picture: Picture) -> Edit:
    """Tint the picture with a random color, without changing its brightness."""
    name = pick(rng, tuple(CASTS))
    cast = np.array(CASTS[name], dtype=np.float64)
    shift = cast - float(cast @ np.array([0.299, 0.587, 0.114]))  # Subtract the luma, so only the hue changes.
    return Edit(_pixels(picture.pixels + shift * float(rng.uniform(60, 85))), new=name)


def black_and_white(rng: Generator, picture: Picture) -> Edit:
    """Convert the picture to gray values."""
    return Edit(np.array(Image.fromarray(picture.pixels).convert("L").convert("RGB")))


def blur(rng: Generator, picture: Picture) -> Edit:
    """Blur the picture with a random radius."""
    radius = float(rng.uniform(0.018, 0.028)) * picture.pixels.shape[0]
    return Edit(np.array(Image.fromarray(picture.pixels).filter(ImageFilter.GaussianBlur(radius))))


def crop(rng: Generator, picture: Picture) -> Edit:
    """Cut out a part at one border or in the middle, half to two thirds of each side, and enlarge it to full size."""
    side, place = picture.pixels.shape[0], pick(rng, tuple(PLACES))
    spare = side - round(side * float(rng.uniform(0.5, 0.66)))
    x = {"left": 0, "right": spare}.get(place, spare // 2)
    y = {"top": 0, "bottom": spare}.get(place, spare // 2)
    box = (x, y, x + side - spare, y + side - spare)
    after = Image.fromarray(picture.pixels).resize((side, side), Image.Resampling.BICUBIC, box=box)
    return Edit(np.array(after), new=place, region=list(box))


def rotate(rng: Generator, picture: Picture) -> Edit:
    """Rotate the picture by 90 degrees to the left or to the right."""
    turn = pick(rng, tuple(TURNS))
    return Edit(np.ascontiguousarray(np.rot90(picture.pixels, TURNS[turn])), new=turn)


def remove(rng: Generator, picture: Picture) -> Edit:
    """Remove the first object of a canvas, or fill a disc in a photograph with colors from the pixels around it."""
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
    """Paste a rendered object, cut out along its outline, over the picture."""
    place, side = pick(rng, tuple(PLACES)), picture.pixels.shape[0]
    half = round(side * float(rng.uniform(0.16, 0.22)))
    # A small object is in the middle of the rendered image, because the camera looks at a point at this height.
    thing = replace(draw_thing(rng, 0.0, 0.0), size="small")
    # At this camera distance, the object fills the rendered image.
    distance = thing.half * {"cube": 6.4, "sphere": 4.5, "cylinder": 5.6}[thing.shape]
    light_azimuth, light_elevation = draw_uniform(rng, (-1.0, 0.6), (0.8, 1.0))
    view = View(0.0, 0.5, distance, 0.0, 0.0, light_azimuth, light_elevation, light_power=0.75, ambient=0.35)
    pixels, ids = render([thing], view, 4 * half, samples=1)
    shown = (ids == 0).astype(np.float64)[..., None]
    # The channels are red, green and blue times alpha (0 to 255), and alpha (0 or 1).
    fine = np.concatenate([pixels * shown, shown], axis=2)
    # Averaging 2 x 2 pixels makes the outline smooth.
    mean = (fine[::2, ::2] + fine[1::2, ::2] + fine[::2, 1::2] + fine[1::2, 1::2]) / 4
    x, y = _draw_middle(rng, place, side, half=half)
    after, region = picture.pixels.copy(), [x - half, y - half, x + half, y + half]
    window = (slice(y - half, y + half), slice(x - half, x + half))
    after[window] = _pixels(mean[..., :3] + (1 - mean[..., 3:]) * after[window])
    return Edit(after, new=place, thing=thing, region=region)


def _draw_middle(rng: Generator, place: str, side: int, *, half: int) -> tuple[int, int]:
    """Draw the middle (x, y), in pixels, of a square near the named position that is completely inside the picture."""
    u, v = (middle + float(rng.uniform(-0.1, 0.1)) for middle in PLACES[place])
    x, y = round(side * (1 + u) / 2), round(side * (1 - v) / 2)
    return min(max(x, half), side - half), min(max(y, half), side - half)


def change_nothing(rng: Generator, picture: Picture) -> Edit:
    """Return the picture unchanged, for the pairs of operation `none`."""
    return Edit(picture.pixels)


def _pixels(values: NDArray[np.floating[Any]]) -> Pixels:
    """Round color values to whole numbers between 0 and 255."""
    return np.floor(np.clip(values, 0, 255) + 0.5).astype(np.uint8)


OPERATIONS: dict[str, Callable[[Generator, Picture], Edit]] = {
    "brighten": brighten, "darken": darken, "more_contrast": partial(change_contrast, low=1.8, high=2.5),
    "less_contrast": partial(change_contrast, low=0.3, high=0.5), "color_cast": color_cast,
    "black_and_white": black_and_white, "blur": blur, "crop": crop, "rotate": rotate, "remove": remove, "paste": paste,
    "none": change_nothing,
}
