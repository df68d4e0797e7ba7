"""The edit operations: functions that draw the strength and position of an edit and apply it to a picture."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageFilter

from onediff.data.synthesis.edits.canvases import draw_thing, render_canvas
from onediff.data.synthesis.edits.pictures import PLACES, Picture, Pixels, draw_uniform, to_pixels
from onediff.data.synthesis.phrases import pick
from onediff.data.synthesis.render import Thing, View, bounding_box, render

CASTS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0), "purple": (1, 0, 1),
         "cyan": (0, 1, 1)}
TURNS = {"to the left": 1, "to the right": -1}  # quarter turns counter-clockwise
LUMA = np.array([0.299, 0.587, 0.114])  # the weights of red, green and blue in the brightness


@dataclass(frozen=True)
class Edit:
    """The result of an edit operation.

    `new` and `thing` fill the fields {new} and {old} of the caption templates. `region` is the rectangle [left, top,
    right, bottom] in pixels of the object that was removed or pasted.
    """

    after: Pixels
    new: str | None = None
    thing: Thing | None = None
    region: list[int] | None = None


def brighten(rng: Generator, picture: Picture) -> Edit:
    """Make the picture brighter by a random gain, a curve that keeps white areas, or an added value."""
    x, form, strength = picture.pixels / 255, int(rng.integers(3)), float(rng.random())
    if form == 0:
        return Edit(to_pixels(255 * x * (1.4 + 0.8 * strength)))
    if form == 1:  # The gain falls to 1 for white pixels, so that bright areas keep their detail.
        return Edit(to_pixels(255 * x * (1 + (0.6 + 0.5 * strength) * (1 - x))))
    return Edit(to_pixels(255 * x + 35 + 55 * strength))


def darken(rng: Generator, picture: Picture) -> Edit:
    """Make the picture darker by a random factor, or by a subtracted value."""
    strength = float(rng.random())
    if rng.random() < 0.7:
        return Edit(to_pixels(picture.pixels * (0.68 - 0.38 * strength)))
    return Edit(to_pixels(picture.pixels - (40 + 50 * strength)))


def change_contrast(rng: Generator, picture: Picture, *, low: float, high: float) -> Edit:
    """Multiply the distance of each value from the mean by a random factor between `low` and `high`."""
    # A sum of integers, unlike a sum of floats, is equal on every machine.
    mean = int(picture.pixels.sum(dtype=np.int64)) / picture.pixels.size
    return Edit(to_pixels(mean + (picture.pixels - mean) * float(rng.uniform(low, high))))


def color_cast(rng: Generator, picture: Picture) -> Edit:
    """Tint the picture with a random color, without changing its brightness.

    The tint is an added color, or a transparent color layer over the picture.
    """
    name = pick(rng, tuple(CASTS))
    cast = np.array(CASTS[name], dtype=np.float64)
    shift = cast - float(cast @ LUMA)  # Subtract the luma, so only the hue changes.
    alpha = 0.0 if rng.random() < 0.6 else float(rng.uniform(0.1, 0.35))
    brightness = int(picture.pixels.sum(dtype=np.int64)) / picture.pixels.size
    layer = (1 - alpha) * picture.pixels + alpha * brightness
    return Edit(to_pixels(layer + shift * float(rng.uniform(45, 90))), new=name)


def black_and_white(rng: Generator, picture: Picture) -> Edit:
    """Convert the picture to gray values."""
    return Edit(np.array(Image.fromarray(picture.pixels).convert("L").convert("RGB")))


def blur(rng: Generator, picture: Picture) -> Edit:
    """Blur the picture with a random radius."""
    radius = float(rng.uniform(0.009, 0.032)) * min(picture.size)
    return Edit(np.array(Image.fromarray(picture.pixels).filter(ImageFilter.GaussianBlur(radius))))


def crop(rng: Generator, picture: Picture) -> Edit:
    """Cut out a part at one border or in the middle, 45 to 70 % of each side, and enlarge it to full size."""
    place, share = pick(rng, tuple(PLACES)), float(rng.uniform(0.45, 0.7))
    width, height = (round(side * share) for side in picture.size)
    x, y = _corner(picture, place, width, height)
    after = Image.fromarray(picture.pixels).resize(picture.size, Image.Resampling.BICUBIC,
                                                   box=(x, y, x + width, y + height))
    return Edit(np.array(after), new=place)


def _corner(picture: Picture, place: str, width: int, height: int) -> tuple[int, int]:
    """Return the upper left corner (x, y) of the part of this size at a border of the picture, or in its middle."""
    spare_x, spare_y = picture.size[0] - width, picture.size[1] - height
    return ({"left": 0, "right": spare_x}.get(place, spare_x // 2),
            {"top": 0, "bottom": spare_y}.get(place, spare_y // 2))


def rotate(rng: Generator, picture: Picture) -> Edit:
    """Rotate the picture by 90 degrees to the left or to the right; width and height are exchanged."""
    turn = pick(rng, tuple(TURNS))
    return Edit(np.ascontiguousarray(np.rot90(picture.pixels, TURNS[turn])), new=turn)


def remove(rng: Generator, picture: Picture) -> Edit:
    """Remove the first object of a canvas, or fill a disc of another picture with colors from the pixels around it."""
    from skimage.restoration import inpaint_biharmonic

    if picture.view and picture.ground is not None:
        after, _ = render_canvas(list(picture.things[1:]), picture.view, picture.ground)
        _, ids = render_canvas(list(picture.things), picture.view, picture.ground)
        return Edit(after, new=picture.place, thing=picture.things[0], region=bounding_box(ids == 0))
    place = pick(rng, tuple(PLACES))
    half = round(min(picture.size) * float(rng.uniform(0.13, 0.19)))
    x, y = _draw_middle(rng, place, picture, half=half + 3)
    window = (slice(y - half - 3, y + half + 3), slice(x - half - 3, x + half + 3))
    ring = (np.arange(2 * half + 6) + 0.5 - half - 3) ** 2
    mask = ring[:, None] + ring[None, :] < half * half
    after = picture.pixels.copy()
    after[window] = to_pixels(255 * inpaint_biharmonic(picture.pixels[window] / 255, mask, channel_axis=2))
    return Edit(after, new=place, region=[x - half, y - half, x + half, y + half])


def paste(rng: Generator, picture: Picture) -> Edit:
    """Paste a rendered object, cut out along its outline, over the picture."""
    place = pick(rng, tuple(PLACES))
    half = round(min(picture.size) * float(rng.uniform(0.14, 0.24)))
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
    x, y = _draw_middle(rng, place, picture, half=half)
    after, region = picture.pixels.copy(), [x - half, y - half, x + half, y + half]
    window = (slice(y - half, y + half), slice(x - half, x + half))
    after[window] = to_pixels(mean[..., :3] + (1 - mean[..., 3:]) * after[window])
    return Edit(after, new=place, thing=thing, region=region)


def _draw_middle(rng: Generator, place: str, picture: Picture, *, half: int) -> tuple[int, int]:
    """Draw the middle (x, y), in pixels, of a square near the named position that is completely inside the picture."""
    u, v = (middle + float(rng.uniform(-0.1, 0.1)) for middle in PLACES[place])
    width, height = picture.size
    x, y = round(width * (1 + u) / 2), round(height * (1 - v) / 2)
    return min(max(x, half), width - half), min(max(y, half), height - half)


def change_nothing(rng: Generator, picture: Picture) -> Edit:
    """Return the picture unchanged, for the pairs of operation `none`."""
    return Edit(picture.pixels)


OPERATIONS: dict[str, Callable[[Generator, Picture], Edit]] = {
    "brighten": brighten, "darken": darken, "more_contrast": partial(change_contrast, low=1.6, high=2.5),
    "less_contrast": partial(change_contrast, low=0.25, high=0.6), "color_cast": color_cast,
    "black_and_white": black_and_white, "blur": blur, "crop": crop, "rotate": rotate, "remove": remove, "paste": paste,
    "none": change_nothing,
}
