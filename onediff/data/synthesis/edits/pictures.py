"""The pictures to which edits are applied: a random window of a photograph, or a rendered table (a canvas)."""

import hashlib
import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image

from onediff.data.synthesis.phrases import pick
from onediff.data.synthesis.render import COLORS, FOV, MATERIALS, SHAPES, SIZES, Camera, Thing, View, render
from onediff.inputs.images import open_image

Pixels = NDArray[np.uint8]

# Photographs that scikit-image and scikit-learn ship: name -> (package, file). A photograph must never move to another
# split, because the backbones in this repository were pretrained on the photographs of `train`.
PHOTOS: dict[str, dict[str, tuple[str, str]]] = {
    "train": {"astronaut": ("skimage", "data/astronaut.png"), "coffee": ("skimage", "data/coffee.png"),
              "hubble_deep_field": ("skimage", "data/hubble_deep_field.jpg"),
              "china": ("sklearn", "datasets/images/china.jpg")},
    "val": {"rocket": ("skimage", "data/rocket.jpg")},
    "gate": {"motorcycle_left": ("skimage", "data/motorcycle_left.png")},
    "test": {"chelsea": ("skimage", "data/chelsea.png"), "flower": ("sklearn", "datasets/images/flower.jpg")},
}
SUFFIXES = (".png", ".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".tif", ".tiff")
SHORT_SIDE = 384  # Photographs are reduced until their shorter side has this many pixels.
# The middle (u, v) of each named position: u is -1 at the left border and 1 at the right, v is -1 at the bottom.
PLACES = {"left": (-0.56, 0.0), "right": (0.56, 0.0), "top": (0.0, 0.56), "bottom": (0.0, -0.56), "center": (0.0, 0.0)}


@dataclass(frozen=True)
class Picture:
    """The picture to which an edit is applied.

    `things`, `view` and `place` are only set for a canvas: `place` is the position of the first object.
    """

    name: str
    pixels: Pixels
    things: tuple[Thing, ...] = ()
    view: View | None = None
    place: str | None = None


@lru_cache(maxsize=8)
def photo_paths(split: str, folder: str | None) -> dict[str, Path]:
    """Return the files of the photographs of a split by name.

    If `folder` is None, these are the photographs that Python packages ship; otherwise the photographs in the folder,
    whose names decide the split. Raises FileNotFoundError if the folder does not exist, and ValueError if no photograph
    falls into the split.
    """
    if folder is None:
        return {name: _packaged(*origin) for name, origin in PHOTOS[split].items()}
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"data.edits.photos: the folder {folder} does not exist; create it, or use null for "
                                "the photographs that Python packages ship")
    files = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in SUFFIXES)
    chosen = {path.name: path for path in files if split_of(path.name) == split}
    if not chosen:
        raise ValueError(
            f"data.edits.photos: none of the {len(files)} photographs in {folder} falls into split '{split}', which "
            "the file names decide; add photographs, or set data.edits.canvas_share to 1"
        )
    return chosen


def split_of(name: str) -> str:
    """Return the split of a user's photograph; it depends only on the file name, so adding files never changes it."""
    place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32
    return "train" if place < 0.7 else "val" if place < 0.78 else "gate" if place < 0.88 else "test"


def _packaged(package: str, file: str) -> Path:
    """Return the path of a file that a package ships, without importing the package."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"the package {package} is not installed, which ships the photograph {file}; install "
                                "it, or set data.edits.photos to a folder of photographs")
    return Path(spec.origin).parent / file


@lru_cache(maxsize=64)
def _photo(path: Path) -> Image.Image:
    """Read a photograph, reduced so that the shorter side has at most SHORT_SIDE pixels."""
    image = open_image(path)
    scale = min(1, SHORT_SIDE / min(image.size))
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)


def draw_window(rng: Generator, split: str, folder: str | None, *, image_px: int) -> Picture:
    """Draw a random square window of a random photograph, and mirror it with probability one half.

    The window is at least half as wide as the shorter side of the photograph, and is resized to `image_px`.
    """
    photos = list(photo_paths(split, folder).items())
    name, path = photos[int(rng.integers(len(photos)))]
    photo = _photo(path)
    short = min(photo.size)
    side = int(rng.integers(short // 2, short + 1))
    x, y = int(rng.integers(photo.width - side + 1)), int(rng.integers(photo.height - side + 1))
    pixels = np.array(photo.resize((image_px, image_px), Image.Resampling.LANCZOS, box=(x, y, x + side, y + side)))
    return Picture(name, np.ascontiguousarray(pixels[:, ::-1]) if rng.random() < 0.5 else pixels)


def draw_canvas(rng: Generator, image_px: int) -> Picture:
    """Draw and render a table with two to five objects, of which the first is at a named position such as "left"."""
    bounds = (-0.1, 0.1), (0.58, 0.66), (-1.0, 0.6), (0.8, 1.0), (0.5, 0.7), (0.25, 0.38)
    azimuth, elevation, *light = draw_uniform(rng, *bounds)
    view = View(azimuth, elevation, 11.0, 0.0, 0.0, *light)
    place = pick(rng, tuple(PLACES))
    count = int(rng.integers(2, 6))
    things: list[Thing] = []
    while len(things) < count:
        x, y = draw_uniform(rng, (-2.4, 2.4), (-2.4, 3.0)) if things else _draw_point(rng, view, place)
        thing = draw_thing(rng, x, y)
        if all((x - other.x) ** 2 + (y - other.y) ** 2 > (thing.half + other.half + 0.5) ** 2 for other in things):
            things.append(thing)
    pixels, _ = render(things, view, image_px)
    return Picture("canvas", pixels, tuple(things), view, place)


def _draw_point(rng: Generator, view: View, place: str) -> tuple[float, float]:
    """Return a point (x, y) of the table that the camera sees at the named position `place` of the image."""
    camera = Camera.of(view)
    u, v = (FOV * (middle + float(rng.uniform(-0.1, 0.1))) for middle in PLACES[place])
    ray = [camera.forward[i] + u * camera.right[i] + v * camera.up[i] for i in range(3)]
    reach = (0.6 - camera.eye[2]) / ray[2]  # where the ray is 0.6 above the table, the height of an object's middle
    return camera.eye[0] + reach * ray[0], camera.eye[1] + reach * ray[1]


def draw_uniform(rng: Generator, *bounds: tuple[float, float]) -> list[float]:
    """Draw a uniform random number between each pair of bounds."""
    return [float(rng.uniform(low, high)) for low, high in bounds]


def draw_thing(rng: Generator, x: float, y: float) -> Thing:
    """Draw an object with random attributes at the point (x, y) of the table."""
    return Thing(pick(rng, SHAPES), pick(rng, tuple(COLORS)), pick(rng, tuple(SIZES)), pick(rng, MATERIALS), x, y,
                 float(rng.uniform(0.0, 1.5)))
