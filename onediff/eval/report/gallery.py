"""Pairs for the page: which ones, their images, where they changed, and where the delta module looked."""

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
from onediff.inputs.images import open_image

MAX_PX = 480  # longer side of an image on the page
_MAGIC = {b"\xff\xd8": "jpeg", b"GI": "gif", b"RI": "webp"}
_HEAT = ((0.0, (20, 10, 90)), (0.5, (215, 45, 80)), (1.0, (255, 230, 90)))  # from least to most looked at

Box = list[float]  # left, top, width, height in percent of an image
Grid = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Side:
    """One image as a data URI; `region`: what changed; `heat`: the delta module's attention, which covers `square`."""

    name: str
    image: str
    region: Box | None = None
    heat: str | None = None
    square: Box | None = None


@dataclass(frozen=True)
class Example:
    """A pair; `sides` is empty where the page has no room for its images; `lost`: CIDEr of the pair below another's."""

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
        return all(self.checks.values())


@dataclass(frozen=True)
class Album:
    """What the page shows of a benchmark: pairs of every type, those that scored least, those that lost most."""

    shown: list[Example] = field(default_factory=list)
    worst: list[Example] = field(default_factory=list)
    lost: list[Example] = field(default_factory=list)


# --- which pairs ------------------------------------------------------------------------------------------------------


def choose(benchmark: str, rows: Sequence[PairRow], predictions: Predictions, *, per_type: int,
           first: Collection[str] = ()) -> list[str]:
    """pair_ids in order of type: right ones, then as many wrong ones, as far as there are both; those of `first` come
    first.
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
    """pair_ids with the lowest scores, lowest first, among the wrong ones; among all where nothing reads captions."""
    wrong = [row["pair_id"] for row in rows
             if not all((checks(benchmark, predictions[row["pair_id"]], row) or {"": False}).values())]
    return sorted(wrong, key=lambda key: scores[key])[:count]


def losses(ours: Mapping[str, float], theirs: Mapping[str, float], *, count: int) -> dict[str, float]:
    """pair_id -> by how much ours is below, greatest first."""
    below = {key: theirs[key] - value for key, value in ours.items() if theirs.get(key, value) > value}
    return dict(sorted(below.items(), key=lambda item: -item[1])[:count])


def fitted(albums: Mapping[str, Album], num_bytes: int) -> dict[str, Album]:
    """The albums, in which the last pairs lose their images where all of them together would be larger."""
    result = {source: Album() for source in albums}
    for name in ("shown", "lost", "worst"):
        ranked = sorted((rank, source) for source, album in albums.items() for rank in range(len(getattr(album, name))))
        for rank, source in ranked:
            example = getattr(albums[source], name)[rank]
            num_bytes -= sum(len(side.image) for side in example.sides)
            getattr(result[source], name).append(example if num_bytes >= 0 else replace(example, sides=[]))
    return result


# --- pictures ---------------------------------------------------------------------------------------------------------


def example(record: Record, prediction: str, *, scores: Mapping[str, float] | None = None,
            maps: Mapping[str, Grid] | None = None) -> Example:
    """A pair with its images. `maps`: side -> attention, which sum to 1 together.

    Raises ValueError for a broken image.
    """
    boxes = {name: record.provenance.get(f"region_{name}") or record.provenance.get("region")
             for name in ("before", "after")}
    if record.change_type == "crop":
        boxes["after"] = None  # the region of a crop is what the second image shows
    peak = max(value for grid in maps.values() for row in grid for value in row) if maps else 0.0
    sides = []
    for name, box in boxes.items():
        image = getattr(record, name)
        width, height = open_image(image).size
        longer = max(width, height)
        left, top = (width - longer) / 2, (height - longer) / 2
        square = (left, top, left + longer, top + longer)  # what the tower pads an image to: the attention covers it
        sides.append(Side(name, data_uri(shrunk(image)), _percent(box, width, height),
                          heat_map(maps[name], peak) if maps else None, _percent(square, width, height)))
    return Example(record.pair_id, record.source, record.change_type, sides, record.references, prediction,
                   checks(record.source, prediction, vars(record)), dict(scores or {}))


def data_uri(image: bytes) -> str:
    kind = _MAGIC.get(image[:2], "png")
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def shrunk(image: bytes) -> bytes:
    """As it is, or as a JPEG if it is larger than the page shows it."""
    opened = open_image(image)
    if max(opened.size) <= MAX_PX:
        return image
    opened.thumbnail((MAX_PX, MAX_PX))
    buffer = io.BytesIO()
    opened.convert("RGB").save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def heat_map(grid: Grid, peak: float) -> str:
    """A data URI with a pixel for each patch; `peak`: the value that is drawn as most looked at."""
    share = np.clip(np.asarray(grid, dtype=np.float64) / peak, 0, 1) if peak else np.zeros(np.shape(grid))
    places = [place for place, _ in _HEAT]
    channels = [np.interp(share, places, [color[k] for _, color in _HEAT]) for k in range(3)]
    pixels = np.stack([*channels, np.full(share.shape, 165.0)], axis=-1)
    buffer = io.BytesIO()
    Image.fromarray(np.rint(pixels).astype(np.uint8), "RGBA").save(buffer, "PNG")
    return data_uri(buffer.getvalue())


def _percent(box: Sequence[float] | None, width: int, height: int) -> Box | None:
    if box is None:
        return None
    left, top, right, bottom = box
    return [round(100 * left / width, 2), round(100 * top / height, 2), round(100 * (right - left) / width, 2),
            round(100 * (bottom - top) / height, 2)]
