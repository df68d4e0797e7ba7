"""Photographs: which ones belong to which split, random windows of them, and their augmentation for training."""

import hashlib
import importlib.util
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.random import Generator
from PIL import Image

from onediff.data.synthesis.edits.pictures import Picture, Pixels, Size, to_pixels
from onediff.inputs.formats import IMAGE_ENDINGS
from onediff.inputs.images import open_image
from onediff.inputs.metadata import EXIF, stripped

_SKIMAGE, _SKLEARN, _MATPLOTLIB = ("skimage", "data"), ("sklearn", "datasets/images"), ("matplotlib",
                                                                                       "mpl-data/sample_data")
# The photographs that Python packages contain, by split: name -> (package, folder, file). docs/data.md describes them.
# No photograph may move to another split, because the committed backbones were pretrained on those of `train`.
PHOTOS: dict[str, dict[str, tuple[str, str, str]]] = {
    "train": {"astronaut": (*_SKIMAGE, "astronaut.png"), "coffee": (*_SKIMAGE, "coffee.png"),
              "hubble_deep_field": (*_SKIMAGE, "hubble_deep_field.jpg"), "china": (*_SKLEARN, "china.jpg"),
              "page": (*_SKIMAGE, "page.png")},
    "val": {"rocket": (*_SKIMAGE, "rocket.jpg"), "grass": (*_SKIMAGE, "grass.png"), "cell": (*_SKIMAGE, "cell.png"),
            "text": (*_SKIMAGE, "text.png")},
    "gate": {"motorcycle_left": (*_SKIMAGE, "motorcycle_left.png"),
             "motorcycle_right": (*_SKIMAGE, "motorcycle_right.png"), "gravel": (*_SKIMAGE, "gravel.png"),
             "retina": (*_SKIMAGE, "retina.jpg"), "clock_motion": (*_SKIMAGE, "clock_motion.png")},
    "test": {"chelsea": (*_SKIMAGE, "chelsea.png"), "flower": (*_SKLEARN, "flower.jpg"),
             "camera": (*_SKIMAGE, "camera.png"), "grace_hopper": (*_MATPLOTLIB, "grace_hopper.jpg"),
             "coins": (*_SKIMAGE, "coins.png"), "brick": (*_SKIMAGE, "brick.png"), "moon": (*_SKIMAGE, "moon.png"),
             "ihc": (*_SKIMAGE, "ihc.png")},
}
# The two images of a stereo camera show one scene, so pairs made from them belong to one group.
SCENE_OF = {"motorcycle_left": "motorcycle", "motorcycle_right": "motorcycle"}
SHORT_SIDE = 384  # Photographs are reduced until their shorter side has this many pixels.


@lru_cache(maxsize=8)
def photo_paths(split: str, folder: str | None) -> dict[str, Path]:
    """Return the photographs of a split as {name: path}.

    If `folder` is None, these are the photographs that Python packages contain; otherwise the photographs in the
    folder, whose names decide the split. Raises FileNotFoundError if the folder does not exist, and ValueError if no
    photograph falls into the split.
    """
    if folder is None:
        return {name: _packaged(*origin) for name, origin in PHOTOS[split].items()}
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"data.edits.photos: the folder {folder} does not exist; create it, or use null for "
                                "the photographs that Python packages contain")
    files = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in IMAGE_ENDINGS)
    chosen = {path.name: path for path in files if split_of(path.name) == split}
    if not chosen:
        raise ValueError(
            f"data.edits.photos: none of the {len(files)} photographs in {folder} falls into split '{split}', which "
            "the file names decide; add photographs, or set data.edits.shares.photograph to 0"
        )
    return chosen


def split_of(name: str) -> str:
    """Return the split of a user's photograph; it depends only on the file name, so adding files never changes it."""
    place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32
    return "train" if place < 0.7 else "val" if place < 0.78 else "gate" if place < 0.88 else "test"


def _packaged(package: str, folder: str, file: str) -> Path:
    """Return the path of a file that a package contains, without importing the package."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"the package {package} is not installed, which contains the photograph {file}; "
                                "install it, or set data.edits.photos to a folder of photographs")
    return Path(spec.origin).parent / folder / file


@lru_cache(maxsize=64)
def _photo(path: Path) -> Image.Image:
    """Read a photograph, reduced so that the shorter side has at most SHORT_SIDE pixels.

    A color profile is ignored, because both images of a pair come from one photograph, and because with their profiles
    the photographs `page` and `rocket` would be other pictures than those of earlier data and models.
    """
    image = open_image(stripped(path.read_bytes(), keep=(EXIF,)), name=str(path))
    scale = min(1, SHORT_SIDE / min(image.size))
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)


def draw_window(rng: Generator, split: str, folder: str | None, *, size: Size) -> Picture:
    """Draw a random window of a random photograph, and mirror it with probability one half.

    The window has the shape of `size`, and is resized to it. Its sides are 0.4 to 1 times as long as those of the
    largest window of this shape, but not shorter than `size` where the photograph allows it.
    """
    photos = list(photo_paths(split, folder).items())
    name, path = photos[int(rng.integers(len(photos)))]
    photo = _photo(path)
    largest = min(photo.width / size[0], photo.height / size[1])
    scale = largest * float(rng.uniform(max(0.4, min(1.0, 1 / largest)), 1.0))
    width, height = (max(1, int(side * scale)) for side in size)
    x, y = int(rng.integers(photo.width - width + 1)), int(rng.integers(photo.height - height + 1))
    pixels = np.array(photo.resize(size, Image.Resampling.LANCZOS, box=(x, y, x + width, y + height)))
    return Picture(name, np.ascontiguousarray(pixels[:, ::-1]) if rng.random() < 0.5 else pixels)


def augment(rng: Generator, pixels: Pixels) -> Pixels:
    """Change the colors of a picture at random, so that few photographs give many different training pictures.

    The changes are a gamma curve and a gain for each channel, and another saturation; for some pictures also another
    order of the channels, or top and bottom exchanged. A tenth of the pictures becomes gray, and a quarter is not
    changed.
    """
    if rng.random() < 0.25:
        return pixels
    if rng.random() < 0.15:
        pixels = pixels[::-1]
    if rng.random() < 0.15:
        pixels = pixels[:, :, rng.permutation(3)]
    gamma, spread = float(rng.uniform(0.6, 1.5)), 0.2 * float(rng.random())
    curves = [[255 * (value / 255) ** (gamma * exponent) * gain for value in range(256)]
              for gain, exponent in zip(rng.uniform(1 - spread, 1 + spread, 3), rng.uniform(0.9, 1.1, 3), strict=True)]
    # The table has whole numbers, because a power may differ in the last bit on another machine.
    table = to_pixels(np.array(curves))
    colored = np.stack([table[channel][pixels[:, :, channel]] for channel in range(3)], axis=2)
    grey = np.array(Image.fromarray(colored).convert("L"), dtype=np.float64)[:, :, None]
    saturation = 0.0 if rng.random() < 0.13 else float(rng.uniform(0.6, 1.4))
    return to_pixels(grey + saturation * (colored - grey))
