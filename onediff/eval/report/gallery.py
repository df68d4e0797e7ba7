"""Choose the pairs that the report shows, and prepare their images, changed regions and attention maps."""

import base64
import io
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image

from onediff.data.record import Record
from onediff.eval.evaluation import checks
from onediff.eval.metrics.words import Predictions
from onediff.eval.protocols import PairRow
from onediff.inputs.formats import HEAD, format_of
from onediff.inputs.images import jpeg, open_image

MAX_PX = 480  # largest width or height of an image on the page, in pixels
_BROWSERS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "AVIF")  # the formats that every browser shows
_HEAT = ((0.0, (20, 10, 90)), (0.5, (215, 45, 80)), (1.0, (255, 230, 90)))  # colours: least to most attention

Box = list[float]  # a box as (left, top, width, height) in percent of the image
Grid = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Side:
    """One of the two images of a pair, as the report page shows it.

    `name` is "before" or "after". `image` is a data URI. `region` is the box of the changed region. `heat` is an image
    of the attention of the delta tokens, as a data URI. It is drawn over the box `square`, which can extend beyond the
    image.
    """

    name: str
    image: str
    region: Box | None = None
    heat: str | None = None
    square: Box | None = None


@dataclass(frozen=True)
class Example:
    """A pair in the gallery of the report, with the caption of the model.

    `sides` is empty if the images of this pair would make the page too large. `checks` maps a part of the caption, such
    as "type", to whether this part is correct. `scores` has the score of this pair for each metric. If the report
    compares two models, `lost` is how much lower the CIDEr of this pair is than with the other model.
    """

    pair_id: str
    source: str
    change_type: str
    sides: list[Side]
    references: list[str]
    prediction: str
    checks: dict[str, bool]
    scores: dict[str, float]
    lost: float | None = None

    @property
    def right(self) -> bool:
        """Whether all checked parts of the caption are correct."""
        return all(self.checks.values())


@dataclass(frozen=True)
class Album:
    """The pairs of one source (dataset) that the report shows.

    `shown` has pairs of every change type; `worst` has the pairs with the lowest CIDEr; `lost` has the pairs whose
    CIDEr is furthest below the CIDEr of the other model.
    """

    shown: list[Example] = field(default_factory=list)
    worst: list[Example] = field(default_factory=list)
    lost: list[Example] = field(default_factory=list)


def choose(benchmark: str, rows: Sequence[PairRow], predictions: Predictions, *, per_type: int,
           first: Collection[str] = ()) -> list[str]:
    """Return the pair_ids of up to `per_type` pairs of each change type, sorted by change type.

    Up to half of the pairs of a type have a wrong caption, or more if there are too few pairs with a right caption.
    Within a type, the pairs with a right caption come first. Pairs in `first` are preferred.
    """
    by_type: dict[str, dict[bool, list[str]]] = {}
    for row in sorted(rows, key=lambda row: row["pair_id"] not in first):
        right = all(checks(benchmark, predictions[row["pair_id"]], row).values())
        by_type.setdefault(row["change_type"], {True: [], False: []})[right].append(row["pair_id"])
    chosen = []
    for _, keys in sorted(by_type.items()):
        wrong = keys[False][:max(per_type // 2, per_type - len(keys[True]))]
        chosen += keys[True][:per_type - len(wrong)] + wrong
    return chosen


def worst(benchmark: str, rows: Sequence[PairRow], predictions: Predictions, scores: Mapping[str, float], *,
          count: int) -> list[str]:
    """Return the pair_ids of the `count` pairs with the lowest scores, lowest first.

    Only pairs with a wrong caption are considered. If no grammar can judge the captions, all pairs are considered.
    """
    wrong = [row["pair_id"] for row in rows
             if not all((checks(benchmark, predictions[row["pair_id"]], row) or {"": False}).values())]
    return sorted(wrong, key=lambda key: scores[key])[:count]


def losses(ours: Mapping[str, float], theirs: Mapping[str, float], *, count: int) -> dict[str, float]:
    """Return the pairs on which our model scores lower than the other model, as {pair_id: difference of the scores}.

    The pairs with the largest difference come first, and at most `count` pairs are returned.
    """
    below = {key: theirs[key] - value for key, value in ours.items() if theirs.get(key, value) > value}
    return dict(sorted(below.items(), key=lambda item: -item[1])[:count])


def fitted(albums: Mapping[str, Album], num_bytes: int) -> dict[str, Album]:
    """Remove images from the albums until at most `num_bytes` of images remain; the texts of all pairs are kept.

    The images in the list `shown` of an album have the highest priority, then those in `lost`, then those in `worst`.
    """
    result = {source: Album() for source in albums}
    for name in ("shown", "lost", "worst"):
        ranked = sorted((rank, source) for source, album in albums.items() for rank in range(len(getattr(album, name))))
        for rank, source in ranked:
            example = getattr(albums[source], name)[rank]
            num_bytes -= sum(len(side.image) for side in example.sides)
            getattr(result[source], name).append(example if num_bytes >= 0 else replace(example, sides=[]))
    return result


def example(record: Record, prediction: str, *, scores: Mapping[str, float] | None = None,
            maps: Mapping[str, Grid] | None = None) -> Example:
    """Return the gallery entry of a pair, with its images as data URIs.

    `maps` has for "before" and "after" a grid of attention weights; the weights of the two grids together sum to 1.
    Raises ValueError if an image cannot be decoded.
    """
    boxes = {name: record.provenance.get(f"region_{name}") or record.provenance.get("region")
             for name in ("before", "after")}
    if record.change_type == "crop":
        boxes["after"] = None  # The second image of a crop shows only the kept region, so it needs no box.
    peak = max(value for grid in maps.values() for row in grid for value in row) if maps else 0.0
    sides = []
    for name, box in boxes.items():
        image = getattr(record, name)
        width, height = open_image(image).size
        longer = max(width, height)
        left, top = (width - longer) / 2, (height - longer) / 2
        # The vision encoder pads each image to a square, and the attention map covers that square.
        square = (left, top, left + longer, top + longer)
        sides.append(Side(name, data_uri(shrunk(image)), _percent(box, width, height),
                          heat_map(maps[name], peak) if maps else None, _percent(square, width, height)))
    return Example(record.pair_id, record.source, record.change_type, sides, record.references, prediction,
                   checks(record.source, prediction, vars(record)), dict(scores or {}))


def data_uri(image: bytes) -> str:
    """Return the encoded image as a data URI. The first bytes decide the media type; PNG if they are unknown."""
    kind = format_of(image[:HEAD]) or "PNG"
    return f"data:image/{kind.lower()};base64,{base64.b64encode(image).decode()}"


def shrunk(image: bytes) -> bytes:
    """Return the image file unchanged if browsers show it and its longer side is at most MAX_PX, else as JPEG file."""
    opened = open_image(image)
    if max(opened.size) <= MAX_PX and format_of(image[:HEAD]) in _BROWSERS:
        return image
    opened.thumbnail((MAX_PX, MAX_PX))
    return jpeg(opened, quality=85)


def heat_map(grid: Grid, peak: float) -> str:
    """Return the attention grid as the data URI of an image with one pixel for each patch.

    The attention weight `peak` gets the brightest colour.
    """
    share = np.clip(np.asarray(grid, dtype=np.float64) / peak, 0, 1) if peak else np.zeros(np.shape(grid))
    stops = [stop for stop, _ in _HEAT]
    channels = [np.interp(share, stops, [color[k] for _, color in _HEAT]) for k in range(3)]
    pixels = np.stack([*channels, np.full(share.shape, 165.0)], axis=-1)
    buffer = io.BytesIO()
    Image.fromarray(np.rint(pixels).astype(np.uint8), "RGBA").save(buffer, "PNG")
    return data_uri(buffer.getvalue())


def _percent(box: Sequence[float] | None, width: int, height: int) -> Box | None:
    """Convert a box (left, top, right, bottom) in pixels to (left, top, width, height) in percent of the image size."""
    if box is None:
        return None
    left, top, right, bottom = box
    return [round(100 * left / width, 2), round(100 * top / height, 2), round(100 * (right - left) / width, 2),
            round(100 * (bottom - top) / height, 2)]
