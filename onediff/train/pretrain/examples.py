"""Draws the single images that pretrain the backbones of the tiny preset, each with labels for every patch.

Most images are rendered table tops, from seeds that no data set uses. Their ground is plain, textured, or replaced by
another picture. The rest are windows of the training photographs and generated pictures, which have no objects. Two of
five images are edited (light, contrast, colour, sharpness, turn, zoom), and then three of five images get a nuisance
(noise, JPEG, resampling). An edit changes the labels that it makes wrong; a nuisance never changes a label.

Shapes:  P pixels per image side, N patches per image.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFilter

from onediff.config import Nuisance, load_params
from onediff.data.synthesis.edits.generated import draw_generated
from onediff.data.synthesis.edits.photographs import augment, draw_window
from onediff.data.synthesis.nuisance import apply, draw
from onediff.data.synthesis.render import COLORS, MATERIALS, SHAPES, SIZES, Thing, render, visible
from onediff.data.synthesis.scenes.captions import name_objects
from onediff.data.synthesis.scenes.drawing import draw_things, draw_view

IMAGE_PX, PATCH_PX = 96, 12
SIDE = IMAGE_PX // PATCH_PX
ATTRIBUTES = {"shape": SHAPES, "color": tuple(COLORS), "size": tuple(SIZES), "material": MATERIALS}
UNKNOWN = -100  # the default ignore_index of cross_entropy
SEED_TAG = 20240705  # The data sets use other seeds, so no image of a test set is drawn here.
# the shares of the kinds of images
TABLE_TOPS, PHOTOGRAPHS = 0.76, 0.12  # the rest are generated pictures
TEXTURED_GROUND, OTHER_GROUND = 0.3, 0.25  # of table tops; the rest has the plain ground
EDITED, EDITED_TWICE, NUISANCE = 0.4, 0.15, 0.6
STRENGTH = 1.2  # of the nuisance, relative to the limits of the tiny preset

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Example:
    """A training image (P, P, 3) with labels for each of the N patches.

    `attributes` (N, 4) are indices into ATTRIBUTES, `present` (N,) is 1 if the patch shows an object and 0 otherwise,
    and `offsets` (N, 2) is the distance from the patch to the centre of the object, in patches. `light` (N, 5) is the
    `photometry` of the image before the nuisance.
    """

    image: Pixels
    attributes: NDArray[np.int8]
    present: NDArray[np.uint8]
    offsets: NDArray[np.float16]
    light: NDArray[np.float16]
    caption: str


@dataclass
class Canvas:
    """An image while it is drawn, with the index of the object that each pixel shows (-1: no object).

    `colors_known` becomes false if an edit changes the colours of objects, and `caption` becomes empty if it is no
    longer true.
    """

    image: Pixels
    ids: NDArray[np.int8]
    things: list[Thing]
    caption: str
    colors_known: bool = True


def make_example(seed: int) -> Example:
    """Draw the training example of a seed; the same seed gives the same example."""
    rng = np.random.default_rng([SEED_TAG, seed])
    kind = rng.random()
    if kind < TABLE_TOPS:
        canvas = table_top(rng)
        change_ground(rng, canvas)
    else:
        image = photograph(rng) if kind < TABLE_TOPS + PHOTOGRAPHS else pattern(rng)
        canvas = Canvas(image, np.full((IMAGE_PX, IMAGE_PX), -1, np.int8), [], "")
    edits = 2 if (share := rng.random()) < EDITED_TWICE else 1 if share < EDITED else 0
    for number in rng.permutation(len(EDITS))[:edits]:
        EDITS[int(number)](rng, canvas)
    if rng.random() > NUISANCE:
        return _labelled(canvas, canvas.image)
    # Light and blur are left out, because they would change the labels `light`.
    return _labelled(canvas, apply(rng, canvas.image, draw(rng, _limits(), strength=STRENGTH, skip=("light", "blur"))))


@functools.cache
def _limits() -> Nuisance:
    return load_params(Path("presets/tiny.yaml")).data.nuisance


def make_plain_example(seed: int) -> Example:
    """Draw a table top with the plain ground, without edits and without nuisance."""
    canvas = table_top(np.random.default_rng([SEED_TAG, seed]))
    return _labelled(canvas, canvas.image)


def _labelled(canvas: Canvas, seen: Pixels) -> Example:
    attributes, present, offsets = patch_labels(canvas.ids, canvas.things)
    if not canvas.colors_known:
        attributes[:, 1] = UNKNOWN
    return Example(seen, attributes, present, offsets, photometry(canvas.image).astype(np.float16), canvas.caption)


def table_top(rng: Generator) -> Canvas:
    """Render a table top with one to six objects, all of which are large enough to see."""
    while True:
        things = draw_things(rng, int(rng.integers(1, 7)))
        view = draw_view(rng, 1.6)
        if things and visible(things, view).min() > 0.004:
            image, ids = render(things, view, IMAGE_PX)
            return Canvas(image, ids, things, name_objects(things, view))


def photograph(rng: Generator) -> Pixels:
    """Return a random square window of a random photograph of the train split."""
    return augment(rng, draw_window(rng, "train", None, size=(IMAGE_PX, IMAGE_PX)).pixels)


def pattern(rng: Generator) -> Pixels:
    """Return a random generated picture."""
    return draw_generated(rng, "train", None, size=(IMAGE_PX, IMAGE_PX)).pixels


def change_ground(rng: Generator, canvas: Canvas) -> None:
    """Give some table tops a textured or coloured ground with the same shadows, or another picture as background."""
    kind = rng.random()
    if kind > TEXTURED_GROUND + OTHER_GROUND:
        return
    other = photograph(rng) if rng.random() < 0.5 else pattern(rng)
    ground = canvas.ids < 0
    if kind < TEXTURED_GROUND:
        texture = other / max(1.0, float(other.mean()))
        strength = rng.uniform(0.2, 1.0)
        tint = rng.uniform(0.6, 1.3, 3)
        other = np.clip(canvas.image * (1 + strength * (texture - 1)) * tint, 0, 255).astype(np.uint8)
    canvas.image = np.where(ground[..., None], other, canvas.image)


def change_light(rng: Generator, canvas: Canvas) -> None:
    canvas.image = np.asarray(ImageEnhance.Brightness(Image.fromarray(canvas.image)).enhance(rng.uniform(0.35, 1.9)))


def change_contrast(rng: Generator, canvas: Canvas) -> None:
    canvas.image = np.asarray(ImageEnhance.Contrast(Image.fromarray(canvas.image)).enhance(rng.uniform(0.3, 2.4)))


def change_colors(rng: Generator, canvas: Canvas) -> None:
    """Multiply each channel by a factor, add a colour, or make the image gray."""
    kind = int(rng.integers(3))
    if kind == 0:
        canvas.image = np.clip(canvas.image * rng.uniform(0.5, 1.4, 3), 0, 255).astype(np.uint8)
    elif kind == 1:
        canvas.image = np.clip(canvas.image + rng.uniform(-60, 60, 3), 0, 255).astype(np.uint8)
    else:
        canvas.image = np.asarray(Image.fromarray(canvas.image).convert("L").convert("RGB"))
    canvas.colors_known, canvas.caption = False, ""


def blur(rng: Generator, canvas: Canvas) -> None:
    canvas.image = np.asarray(Image.fromarray(canvas.image).filter(ImageFilter.GaussianBlur(rng.uniform(0.6, 2.7))))


def turn(rng: Generator, canvas: Canvas) -> None:
    """Rotate by a multiple of 90 degrees."""
    turns = int(rng.integers(1, 4))
    canvas.image = np.ascontiguousarray(np.rot90(canvas.image, turns))
    canvas.ids = np.ascontiguousarray(np.rot90(canvas.ids, turns))
    canvas.caption = ""


def zoom(rng: Generator, canvas: Canvas) -> None:
    """Enlarge a random window to the full size; it need not be square, as the images of many data sets are not."""
    width, height = (round(IMAGE_PX * float(share)) for share in rng.uniform(0.5, 1.0, 2))
    left, top = int(rng.integers(IMAGE_PX - width + 1)), int(rng.integers(IMAGE_PX - height + 1))
    box, size = (left, top, left + width, top + height), (IMAGE_PX, IMAGE_PX)
    canvas.image = np.asarray(Image.fromarray(canvas.image).resize(size, Image.Resampling.BICUBIC, box=box))
    canvas.ids = np.asarray(Image.fromarray(canvas.ids.view(np.uint8)).resize(
        size, Image.Resampling.NEAREST, box=box)).view(np.int8)
    canvas.caption = ""


Edit = Callable[[Generator, Canvas], None]
EDITS: tuple[Edit, ...] = (change_light, change_contrast, change_colors, blur, turn, zoom)


def patch_labels(ids: NDArray[np.int8],
                 things: list[Thing]) -> tuple[NDArray[np.int8], NDArray[np.uint8], NDArray[np.float16]]:
    """Label each of the N patches with the object that covers most of it.

    Returns the arrays attributes (N, 4), present (N,) and offsets (N, 2, in patches) of an `Example`. `ids` (P, P) is
    the index of the object at each pixel, or -1.
    """
    patches = ids.reshape(SIDE, PATCH_PX, SIDE, PATCH_PX).transpose(0, 2, 1, 3).reshape(SIDE * SIDE, -1)
    attributes = np.full((len(patches), 4), UNKNOWN, np.int8)
    present = np.zeros(len(patches), np.uint8)
    offsets = np.full((len(patches), 2), np.nan, np.float16)
    if not things:
        return attributes, present, offsets
    share = np.stack([(patches == k).mean(axis=1) for k in range(len(things))], axis=1)
    best = share.argmax(axis=1)
    rows, columns = np.divmod(np.arange(len(patches)), SIDE)
    for k, thing in enumerate(things):
        shows = (best == k) & (share[:, k] > 0.12)
        y, x = (axis.mean() / PATCH_PX for axis in np.nonzero(ids == k)) if (ids == k).any() else (0.0, 0.0)
        present[shows] = 1
        attributes[shows] = [options.index(getattr(thing, name)) for name, options in ATTRIBUTES.items()]
        offsets[shows] = np.stack([x - columns[shows] - 0.5, y - rows[shows] - 0.5], axis=1)
    return attributes, present, offsets


def photometry(image: Pixels) -> NDArray[np.float32]:
    """Return colour statistics (N, 5) of each patch: mean red, green and blue, contrast, and sharpness."""
    pixels = image.astype(np.float32) / 255
    grey = pixels.mean(axis=2, keepdims=True)
    edges = np.pad(np.abs(np.diff(grey, axis=1)), ((0, 0), (0, 1), (0, 0)))
    values = np.concatenate([pixels, grey, grey**2, edges], axis=2)
    means = values.reshape(SIDE, PATCH_PX, SIDE, PATCH_PX, -1).mean(axis=(1, 3)).reshape(SIDE * SIDE, -1)
    contrast = np.sqrt(np.maximum(means[:, 4] - means[:, 3] ** 2, 1e-6))
    return np.column_stack([means[:, :3], 4 * contrast, 10 * means[:, 5]])
