"""The source `edits`: a photograph or a rendered canvas, edited by program, and the edit said as a request.

Every record has its own random stream, so any process can make any record and the bytes are the same.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from onediff.config import Config
from onediff.data.record import SPLITS, Record
from onediff.data.synthesis.phrases import EDIT_TEMPLATES, INSTRUCTIONS, phrasings, pick, say
from onediff.data.synthesis.render import COLORS, FOV, MATERIALS, SHAPES, SIZES, Camera, Thing, View, render
from onediff.inputs.images import open_image, png

Pixels = NDArray[np.uint8]

PHOTOS: dict[str, dict[str, tuple[str, str]]] = {  # fixed once: the committed backbones have seen those of `train`
    "train": {"astronaut": ("skimage", "data/astronaut.png"), "coffee": ("skimage", "data/coffee.png"),
              "hubble_deep_field": ("skimage", "data/hubble_deep_field.jpg"),
              "china": ("sklearn", "datasets/images/china.jpg")},
    "val": {"rocket": ("skimage", "data/rocket.jpg")},
    "gate": {"motorcycle_left": ("skimage", "data/motorcycle_left.png")},
    "test": {"chelsea": ("skimage", "data/chelsea.png"), "flower": ("sklearn", "datasets/images/flower.jpg")},
}
SUFFIXES = (".png", ".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".tif", ".tiff")
TAG = 4  # the number of this source in every random stream; scenes has 1 to 3
SHORT_SIDE = 384  # photographs are kept at this size

CASTS = {
    "red": (1, 0, 0),
    "green": (0, 1, 0),
    "blue": (0, 0, 1),
    "yellow": (1, 1, 0),
    "purple": (1, 0, 1),
    "cyan": (0, 1, 1),
}
PLACES = {"left": (-0.56, 0.0), "right": (0.56, 0.0), "top": (0.0, 0.56), "bottom": (0.0, -0.56), "center": (0.0, 0.0)}
TURNS = {"to the left": 1, "to the right": -1}  # quarter turns counter-clockwise

STEP = 20  # a pixel has changed if a channel moved by more; an edit shows if this share of the pixels has:
MIN_CHANGED = {
    "remove": 0.02,
    "paste": 0.02,
    "black_and_white": 0.03,
    "blur": 0.03,
    "more_contrast": 0.06,
    "less_contrast": 0.06,
}
MIN_CHANGED_ELSEWHERE = 0.2


@dataclass(frozen=True)
class Picture:
    """Where an edit starts. On a canvas the scene is known, and its first thing stands at `place`."""

    name: str
    pixels: Pixels
    things: tuple[Thing, ...] = ()
    view: View | None = None
    place: str | None = None


@dataclass(frozen=True)
class Edit:
    """What came of it: pixels, the word for {new}, the object for {old}, its rectangle in pixels."""

    after: Pixels
    new: str | None = None
    thing: Thing | None = None
    region: list[int] | None = None


def edits(config: Config, split: str) -> Iterator[Record]:
    for index in range(getattr(config.data.edits.num_pairs, split)):
        yield edit_record(config, split, index)


def edit_record(config: Config, split: str, index: int) -> Record:
    """Record `index` of the split; no other record is needed for it. Raises ValueError if no edit can be seen."""
    seed = [config.seed, TAG, SPLITS.index(split), index]
    rng = np.random.default_rng(seed)
    operation = pick(rng, tuple(EDIT_TEMPLATES))
    on_canvas = rng.random() < config.data.edits.canvas_share
    picture, edit = _visible_edit(rng, config, split, operation=operation, on_canvas=on_canvas)
    thing = edit.thing
    return Record(
        pair_id=f"edits-{split}-{index:06d}",
        source="edits",
        split=split,
        group_id=f"canvas/{split}/{index}" if on_canvas else f"photo/{picture.name}",
        before=_encode(rng, picture.pixels),
        after=_encode(rng, edit.after),
        references=_references(rng, operation, edit),
        instruction=pick(rng, INSTRUCTIONS["edits"]),
        change_type=operation,
        provenance={
            "seed": seed,
            "photo": picture.name,
            "new": edit.new,
            "region": edit.region,
            "object": thing and {key: getattr(thing, key) for key in ("shape", "color", "size", "material")},
        },
    )


def _visible_edit(
    rng: Generator, config: Config, split: str, *, operation: str, on_canvas: bool
) -> tuple[Picture, Edit]:
    """Draws pictures until the edit shows: a blur of clear sky would not."""
    image_px, folder = config.data.image_px, config.data.edits.photos
    for _ in range(100):
        picture = _canvas(rng, image_px) if on_canvas else _window(rng, split, folder, image_px=image_px)
        edit = OPERATIONS[operation](rng, picture)
        enough = 0 if operation == "none" else MIN_CHANGED.get(operation, MIN_CHANGED_ELSEWHERE)
        if changed_share(picture.pixels, edit.after) >= enough:
            return picture, edit
    raise ValueError(
        f"edits: '{operation}' cannot be seen in any of 100 windows of the photographs of split '{split}'; "
        "use photographs with more colour and detail"
    )


def changed_share(before: Pixels, after: Pixels) -> float:
    """Share of pixels that a person sees change."""
    return float((np.abs(before.astype(np.int16) - after).max(axis=2) > STEP).mean())


def _encode(rng: Generator, pixels: Pixels) -> bytes:
    """PNG bytes after a JPEG round trip of random quality, so that equal bytes do not give `none` away."""
    lossy = io.BytesIO()
    Image.fromarray(pixels).save(lossy, "JPEG", quality=int(rng.integers(88, 98)), subsampling=0)
    return png(Image.open(lossy))


def _references(rng: Generator, operation: str, edit: Edit) -> list[str]:
    sentences = []
    for template in phrasings(rng, EDIT_TEMPLATES[operation], 3):
        old = f"{edit.thing.color} {say(rng, edit.thing.shape)}" if edit.thing else ""
        sentences.append(template.format(old=old, new=edit.new))
    return sentences


# --- pictures ---


def photo_paths(split: str, folder: str | None) -> dict[str, Path]:
    """Name -> file of the split's photographs: those that the packages ship, or those of `folder` by their names.

    Raises FileNotFoundError for a missing folder, ValueError if no photograph falls into the split.
    """
    if folder is None:
        return {name: _packaged(*where) for name, where in PHOTOS[split].items()}
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"data.edits.photos: folder {folder} not found; null takes the packaged photographs")
    files = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in SUFFIXES)
    chosen = {path.name: path for path in files if split_of(path.name) == split}
    if not chosen:
        raise ValueError(
            f"data.edits.photos: none of the {len(files)} photographs in {folder} falls into split '{split}' "
            "(names decide); add more, or set data.edits.canvas_share to 1"
        )
    return chosen


def split_of(name: str) -> str:
    """The split of a user's photograph; another photograph beside it never moves it."""
    place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32
    return "train" if place < 0.7 else "val" if place < 0.78 else "gate" if place < 0.88 else "test"


def _packaged(package: str, file: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"package {package} is not installed: it ships the photograph {file}")
    return Path(spec.origin).parent / file


@lru_cache(maxsize=64)
def _photo(path: Path) -> Image.Image:
    image = open_image(path)
    scale = SHORT_SIDE / min(image.size)
    if scale >= 1:
        return image
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)


@lru_cache(maxsize=8)
def _photos(split: str, folder: str | None) -> tuple[tuple[str, Path], ...]:
    return tuple(photo_paths(split, folder).items())


def _window(rng: Generator, split: str, folder: str | None, *, image_px: int) -> Picture:
    """A random square of a random photograph, at least half as wide as its short side; mirrored half of the time."""
    photos = _photos(split, folder)
    name, path = photos[int(rng.integers(len(photos)))]
    photo = _photo(path)
    short = min(photo.size)
    side = int(rng.integers(short // 2, short + 1))
    x, y = int(rng.integers(photo.width - side + 1)), int(rng.integers(photo.height - side + 1))
    window = photo.resize((image_px, image_px), Image.Resampling.LANCZOS, box=(x, y, x + side, y + side))
    pixels = np.array(window)
    return Picture(name, np.ascontiguousarray(pixels[:, ::-1]) if rng.random() < 0.5 else pixels)


def _canvas(rng: Generator, image_px: int) -> Picture:
    """A rendered table with two to five things; the first stands at a place that has a name."""
    bounds = (-0.1, 0.1), (0.58, 0.66), (-1.0, 0.6), (0.8, 1.0), (0.5, 0.7), (0.25, 0.38)
    azimuth, elevation, *light = _uniform(rng, *bounds)
    view = View(azimuth, elevation, 11.0, 0.0, 0.0, *light)
    place = pick(rng, tuple(PLACES))
    count = int(rng.integers(2, 6))
    things: list[Thing] = []
    while len(things) < count:
        thing = _thing(rng, _stand(rng, view, place) if not things else tuple(_uniform(rng, (-2.4, 2.4), (-2.4, 3.0))))
        if all(
            (thing.x - other.x) ** 2 + (thing.y - other.y) ** 2 > (thing.half + other.half + 0.5) ** 2
            for other in things
        ):
            things.append(thing)
    pixels, _ = render(things, view, image_px)
    return Picture("canvas", pixels, tuple(things), view, place)


def _uniform(rng: Generator, *bounds: tuple[float, float]) -> list[float]:
    return [float(rng.uniform(low, high)) for low, high in bounds]


def _thing(rng: Generator, stand: tuple[float, ...]) -> Thing:
    return Thing(
        pick(rng, SHAPES),
        pick(rng, tuple(COLORS)),
        pick(rng, tuple(SIZES)),
        pick(rng, MATERIALS),
        stand[0],
        stand[1],
        float(rng.uniform(0.0, 1.5)),
    )


def _stand(rng: Generator, view: View, place: str) -> tuple[float, float]:
    """A point of the table that the camera sees at `place`."""
    camera = Camera.of(view)
    u, v = (FOV * (middle + float(rng.uniform(-0.1, 0.1))) for middle in PLACES[place])
    ray = [camera.forward[i] + u * camera.right[i] + v * camera.up[i] for i in range(3)]
    reach = (0.6 - camera.eye[2]) / ray[2]  # at the height of a thing's middle
    return camera.eye[0] + reach * ray[0], camera.eye[1] + reach * ray[1]


# --- operations: a random stream and a picture in, an edit out ---


def _pixels(values: NDArray[np.floating[Any]]) -> Pixels:
    return np.floor(np.clip(values, 0, 255) + 0.5).astype(np.uint8)


def _mean(pixels: Pixels) -> float:
    return int(pixels.sum(dtype=np.int64)) / pixels.size  # a sum of integers is the same on every machine


def brighten(rng: Generator, picture: Picture) -> Edit:
    x = picture.pixels / 255
    return Edit(_pixels(255 * x * (1 + float(rng.uniform(0.7, 1.0)) * (1 - x))))  # a gain that never saturates


def darken(rng: Generator, picture: Picture) -> Edit:
    return Edit(_pixels(picture.pixels * float(rng.uniform(0.35, 0.55))))


def more_contrast(rng: Generator, picture: Picture) -> Edit:
    middle = _mean(picture.pixels)
    return Edit(_pixels(middle + (picture.pixels - middle) * float(rng.uniform(1.8, 2.5))))


def less_contrast(rng: Generator, picture: Picture) -> Edit:
    middle = _mean(picture.pixels)
    return Edit(_pixels(middle + (picture.pixels - middle) * float(rng.uniform(0.3, 0.5))))


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
    side = picture.pixels.shape[0]
    place = pick(rng, tuple(PLACES))
    spare = side - round(side * float(rng.uniform(0.5, 0.66)))
    x = {"left": 0, "right": spare}.get(place, spare // 2)
    y = {"top": 0, "bottom": spare}.get(place, spare // 2)
    box = (x, y, x + side - spare, y + side - spare)
    return Edit(
        np.array(Image.fromarray(picture.pixels).resize((side, side), Image.Resampling.BICUBIC, box=box)),
        new=place,
        region=list(box),
    )


def rotate(rng: Generator, picture: Picture) -> Edit:
    turn = pick(rng, tuple(TURNS))
    return Edit(np.ascontiguousarray(np.rot90(picture.pixels, TURNS[turn])), new=turn)


def remove(rng: Generator, picture: Picture) -> Edit:
    """A canvas is rendered without its first thing; in a photograph an ellipse is filled from around it."""
    if picture.view is None:
        return _inpaint(rng, picture)
    side = picture.pixels.shape[0]
    after, _ = render(list(picture.things[1:]), picture.view, side)
    _, ids = render(list(picture.things), picture.view, side, samples=1)
    rows, columns = np.nonzero(ids == 0)
    region = [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1] if rows.size else None
    return Edit(after, new=picture.place, thing=picture.things[0], region=region)


def _inpaint(rng: Generator, picture: Picture) -> Edit:
    from skimage.restoration import inpaint_biharmonic

    place, side = pick(rng, tuple(PLACES)), picture.pixels.shape[0]
    half = round(side * float(rng.uniform(0.12, 0.15)))
    x, y = _spot(rng, place, side, half=half + 3)
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
    thing = replace(_thing(rng, (0.0, 0.0)), size="small")  # its middle is then where the camera looks
    color, alpha = _cut_out(rng, thing, 2 * half)
    x, y = _spot(rng, place, side, half=half)
    after = picture.pixels.copy()
    window = (slice(y - half, y + half), slice(x - half, x + half))
    after[window] = _pixels(color + (1 - alpha[..., None]) * after[window])
    return Edit(after, new=place, thing=thing, region=[x - half, y - half, x + half, y + half])


def _spot(rng: Generator, place: str, side: int, *, half: int) -> tuple[int, int]:
    """The middle (x, y) of a square at `place` that lies inside the picture, in pixels."""
    u, v = (middle + float(rng.uniform(-0.1, 0.1)) for middle in PLACES[place])
    x, y = round(side * (1 + u) / 2), round(side * (1 - v) / 2)
    return min(max(x, half), side - half), min(max(y, half), side - half)


def _cut_out(rng: Generator, thing: Thing, side: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The thing alone: colour times alpha (S, S, 3) in 0 to 255, and alpha (S, S), smooth along the outline."""
    distance = thing.half * {"cube": 6.4, "sphere": 4.5, "cylinder": 5.6}[thing.shape]  # fills the frame
    light_azimuth, light_elevation = _uniform(rng, (-1.0, 0.6), (0.8, 1.0))
    view = View(0.0, 0.5, distance, 0.0, 0.0, light_azimuth, light_elevation, light_power=0.75, ambient=0.35)
    pixels, ids = render([thing], view, 2 * side, samples=1)
    shown = (ids == 0).astype(np.float64)
    fine = np.concatenate([pixels * shown[..., None], shown[..., None]], axis=2)
    mean = (fine[::2, ::2] + fine[1::2, ::2] + fine[::2, 1::2] + fine[1::2, 1::2]) / 4
    return mean[..., :3], mean[..., 3]


def none(rng: Generator, picture: Picture) -> Edit:
    return Edit(picture.pixels)


OPERATIONS: dict[str, Callable[[Generator, Picture], Edit]] = {
    "brighten": brighten, "darken": darken, "more_contrast": more_contrast, "less_contrast": less_contrast,
    "color_cast": color_cast, "black_and_white": black_and_white, "blur": blur, "crop": crop, "rotate": rotate,
    "remove": remove, "paste": paste, "none": none,
}
