"""Figures of how much attention of the delta tokens falls on the changed region of each image."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onediff.data.record import Record
from onediff.eval.analysis.behaviour import rates
from onediff.eval.protocols import PairRow
from onediff.inputs.boxes import coverage, on_the_grid
from onediff.inputs.images import open_image
from onediff.model.attention import AttentionMaps, Grid, attention_maps
from onediff.model.captioner import Captioner

Box = Sequence[float]  # left, top, right and bottom edge, in pixels
SIDES = ("before", "after")
BATCH = 32  # pairs per forward pass
# These figures are also reported separately for `before`, for `after` and for each change type.
FIGURES = ("attention_share", "inside_share", "pointing_accuracy")


def regions(row: PairRow) -> dict[str, Box]:
    """Return the box of the changed region in each image, as {"before" or "after": box}.

    The result is empty if the region is unknown. A crop has no changed region, because its provenance records the part
    of the image that was kept.
    """
    if row["change_type"] in ("none", "crop"):
        return {}
    provenance = row["provenance"]
    boxes = {side: provenance.get(f"region_{side}") or provenance.get("region") for side in SIDES}
    return {side: box for side, box in boxes.items() if box}


def points_inside(grid: Grid, box: Sequence[float]) -> bool:
    """Return whether the centre of the patch with the highest value in `grid` lies inside the box.

    The edges of the box are given in units of patches. If several patches have the highest value, the first one is
    used.
    """
    row, column = np.unravel_index(int(grid.argmax()), grid.shape)
    return _inside(column + 0.5, row + 0.5, box)


def _inside(x: float, y: float, box: Sequence[float]) -> bool:
    left, top, right, bottom = box
    return bool(left <= x < right and top <= y < bottom)


@dataclass(frozen=True)
class RegionFigures:
    """The attention figures of one image of a changed pair.

    `group` is the group_id of the pair. `side` is "before" or "after". `attention_figures` explains the figures.
    """

    group: str
    change_type: str
    side: str
    figures: dict[str, float]


def region_figures(record: Record, maps: AttentionMaps) -> list[RegionFigures]:
    """Return measurements of the attention on each image of a pair whose changed region is known.

    Raises ValueError for an image that cannot be decoded.
    """
    images = []
    for name, box in regions(vars(record)).items():
        grid, side = getattr(maps, name), len(maps.change)
        place = on_the_grid(box, open_image(getattr(record, name)).size, side=side)
        inside = coverage(place, side=side)
        levels = {level: grids[SIDES.index(name)] for level, grids in maps.levels.items()}
        middles = np.arange(side) + 0.5
        figures = {
            "attention_share": float(grid.sum()), "inside_share": _share(grid, inside),
            "area_share": float(inside.mean()),
            "difference_inside_share": _share(maps.change, inside),
            "pointing_accuracy": points_inside(grid, place),
            "difference_pointing_accuracy": points_inside(maps.change, place),
            "centre_pointing_accuracy": _inside(side / 2, side / 2, place),
            # A changed region that is smaller than a patch may not contain the centre of any patch.
            "pointing_ceiling": any(_inside(x, y, place) for x in middles for y in middles),
            **{f"level_{level}_inside_share": _share(each, inside) for level, each in levels.items()},
            **{f"level_{level}_pointing_accuracy": points_inside(each, place) for level, each in levels.items()}}
        images.append(RegionFigures(record.group_id, record.change_type, name, figures))
    return images


def _share(grid: Grid, inside: Grid) -> float:
    total = float(grid.sum())
    return float((grid * inside).sum()) / total if total else 0.0


def attention_figures(images: Sequence[RegionFigures]) -> dict[str, Any]:
    """Return the means of the attention figures over images with a known changed region, with 95 % intervals.

    attention_share: share of the attention on both images of a pair that falls on this image.

    inside_share: share of the attention on an image that falls into the changed region. Two figures are for comparison:
    difference_inside_share is the share of the pixel differences that lies in the region; area_share is the share of
    the image area that the region covers, which uniform attention would reach.

    pointing_accuracy: share of images in which the centre of the patch with the most attention lies in the region.
    Three figures are for comparison: difference_pointing_accuracy uses the patch with the largest pixel difference;
    centre_pointing_accuracy uses the centre of the image; pointing_ceiling is the share of images in which the region
    contains the centre of any patch.

    The result is empty if there are no images.
    """
    if not images:
        return {}
    parts = {f"by_{key}": {kind: _mean_figures([image for image in images if getattr(image, key) == kind], FIGURES)
                           for kind in sorted({getattr(image, key) for image in images})}
             for key in ("side", "change_type")}
    return {**_mean_figures(images, tuple(images[0].figures)), **parts}


def _mean_figures(images: Sequence[RegionFigures], names: Sequence[str]) -> dict[str, Any]:
    return {"num_images": len(images),
            **rates({name: [(image.group, image.figures[name]) for image in images] for name in names})}


def maps_of_records(captioner: Captioner, records: Sequence[Record]) -> Iterator[tuple[Record, AttentionMaps]]:
    """Yield each record with the attention maps of its images.

    Raises ValueError for an image that cannot be decoded.
    """
    for start in range(0, len(records), BATCH):
        batch = records[start : start + BATCH]
        pairs = [(open_image(record.before), open_image(record.after)) for record in batch]
        yield from zip(batch, attention_maps(captioner, pairs), strict=True)
