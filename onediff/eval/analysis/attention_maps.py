"""Attention maps of the delta tokens, and figures of how much attention falls on the changed region.

A map shows how much cross-attention the Visual Delta Module gives to each patch of both images.

Shapes:  B pairs, X cross-attention layers, P patches per image side, N = P * P patches per image, K delta tokens,
         W width of the module, S keys: 2N (before, after) or 3N (before, after, difference).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from onediff.data.record import Record
from onediff.eval.analysis.behaviour import rates
from onediff.eval.protocols import PairRow
from onediff.inputs.images import open_image
from onediff.model.captioner import Captioner
from onediff.model.delta import Attention, DeltaLayer, VisualDeltaModule

Grid = NDArray[np.float64]
Box = Sequence[float]  # left, top, right and bottom edge, in pixels
SIDES = ("before", "after")
BATCH = 32  # pairs per forward pass
# These figures are also reported separately for `before`, for `after` and for each change type.
FIGURES = ("attention_share", "inside_share", "pointing_accuracy")


@dataclass(frozen=True)
class AttentionMaps:
    """The attention of the delta tokens on the P x P patches of both images of one pair.

    `before`, `after` (P, P): the attention on each patch of the image, averaged over delta tokens, heads and layers;
    the two maps together sum to 1. `levels` maps each feature level of the vision encoder to the two maps (2, P, P),
    averaged over the layers that read this level. `change` (P, P): mean absolute pixel difference between the two
    images in each patch, for comparison.
    """

    before: Grid
    after: Grid
    levels: dict[int, Grid]
    change: Grid


@torch.inference_mode()
def attention_maps(captioner: Captioner, pairs: Sequence[tuple[Image.Image, Image.Image]]) -> list[AttentionMaps]:
    """Return the attention maps of each image pair. Raises ValueError for a model without delta tokens."""
    model, delta = captioner.model, captioner.model.delta
    if delta is None:
        raise ValueError("model.delta.num_tokens is 0, but attention maps need a model with delta tokens; "
                         "choose a model with num_tokens greater than 0")
    images = captioner.processor.pixels([image for pair in pairs for image in pair])  # (2B, 3, H, W)
    states = model.vision(images.to(model.device)).to(delta.tokens.dtype).unflatten(0, (-1, 2))
    with recorded(delta) as weights:
        delta(states[:, 0], states[:, 1])
    side, read = model.config.patches_per_side, np.array(model.config.delta_levels)
    by_image = per_image(torch.stack(weights, 1).double().cpu().numpy(), side=side)  # (B, X, 2, P, P)
    change = pixel_change(images.unflatten(0, (-1, 2)), side=side)
    return [AttentionMaps(before=maps.mean(0)[0], after=maps.mean(0)[1], change=difference,
                          levels={int(level): maps[read == level].mean(0) for level in np.unique(read)})
            for maps, difference in zip(by_image, change, strict=True)]


@contextmanager
def recorded(delta: VisualDeltaModule) -> Iterator[list[Tensor]]:
    """Yield a list to which the next forward pass adds the attention weights of each cross-attention layer.

    The weights of a layer have shape (B pairs, S keys). They are averaged over heads and delta tokens, and sum to 1 for
    each pair.
    """
    weights: list[Tensor] = []

    def record(module: nn.Module, inputs: tuple[Tensor, Tensor], _: Tensor) -> None:
        assert isinstance(module, Attention), "the hook must be registered on cross-attention modules only"
        weights.append(attention_weights(module, *inputs).mean((1, 2)))

    layers = [layer for layer in delta.layers if isinstance(layer, DeltaLayer)]
    hooks = [layer.cross_attention.register_forward_hook(record) for layer in layers
             if layer.cross_attention is not None]
    try:
        yield weights
    finally:
        for hook in hooks:
            hook.remove()


def attention_weights(attention: Attention, queries: Tensor, context: Tensor) -> Tensor:
    """Compute the attention weights of a cross-attention module, (B pairs, heads, K queries, S keys).

    `queries` is (B, K, width), `context` is (B, S, width). The forward pass of the module uses a fused attention
    function, which does not return the weights.
    """
    query, key = (part.unflatten(-1, (attention.heads, -1)).transpose(1, 2).float()
                  for part in (attention.query(queries), attention.key(context)))
    return (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1)


def per_image(weights: Grid, *, side: int) -> Grid:
    """Return the attention on the P x P patches of both images, (B pairs, X layers, 2 images, P, P).

    `weights` (B, X, keys) has the attention on the patches of `before`, then on the patches of `after`, and in some
    models also on the differences between these patches. Half of the attention on a difference is added to each image.
    """
    # The views are `before`, `after` and, in some models, the difference of both images.
    views = weights.reshape(*weights.shape[:2], -1, side, side)  # (B, X, views, P, P)
    return views[:, :, :2] + views[:, :, 2:].sum(2, keepdims=True) / 2


def pixel_change(images: Tensor, *, side: int) -> Grid:
    """Return the mean absolute pixel difference between the two images in each patch, (B pairs, P x P patches).

    `images` is (B, 2 images, 3 colors, height, width).
    """
    difference = (images[:, 1] - images[:, 0]).double().abs().mean(1)  # (B, H, W)
    px = difference.shape[-1] // side
    patches = difference[:, : side * px, : side * px].unflatten(2, (side, px)).unflatten(1, (side, px))
    return patches.mean((2, 4)).numpy()


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


def on_the_grid(box: Box, size: tuple[int, int], *, side: int) -> tuple[float, ...]:
    """Convert a box from pixels of an image to units of patches.

    The vision encoder pads an image to a square, so the result is relative to this square. `size` is the width and
    height of the image, `side` is the number of patches per side of the square.
    """
    longer = max(size)
    margins = [(longer - length) / 2 for length in size]
    return tuple((value + margins[axis % 2]) * side / longer for axis, value in enumerate(box))


def coverage(box: Sequence[float], *, side: int) -> Grid:
    """Return for each of the P x P patches which share of its area lies inside the box, (P, P).

    The edges of the box are given in units of patches.
    """
    left, top, right, bottom = box
    starts = np.arange(side)
    across, down = (np.clip(np.minimum(starts + 1, high) - np.maximum(starts, low), 0, 1)
                    for low, high in ((left, right), (top, bottom)))
    return down[:, None] * across[None, :]


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
    """Return the attention figures of each image of a pair in which the changed region is known.

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
