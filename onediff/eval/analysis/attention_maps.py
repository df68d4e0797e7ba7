"""Cross-attention of the delta tokens: where the Visual Delta Module looks, and how much of it meets the change.

Shapes:  B pairs, X cross-attentions, P patches along a side, N = P * P, K delta tokens, W width of the module,
         S = 2N or 3N keys.
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
Box = Sequence[float]  # left, top, right, bottom in pixels
SIDES = ("before", "after")
BATCH = 32  # pairs
FIGURES = ("attention_share", "inside_share", "pointing_accuracy")  # also by side and by change type


@dataclass(frozen=True)
class AttentionMaps:
    """How much each patch is looked at: `before` and `after` (P, P), of all delta tokens, heads and layers, which sum
    to 1 together; `levels`: the same of the layers that read one level of the tower, (2, P, P).

    `change` (P, P): mean difference of the pixels as the tower gets them, what the attention is compared with.
    """

    before: Grid
    after: Grid
    levels: dict[int, Grid]
    change: Grid


@torch.inference_mode()
def attention_maps(captioner: Captioner, pairs: Sequence[tuple[Image.Image, Image.Image]]) -> list[AttentionMaps]:
    """The maps of each pair. Raises ValueError for a model without delta tokens."""
    model, delta = captioner.model, captioner.model.delta
    if delta is None:
        raise ValueError("model.delta.num_tokens is 0: a model without delta tokens has no attention of theirs; "
                         "ask one that has some")
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
    """Fills the list with what each cross-attention looks at in the next pass: (B, S), which sums to 1 over S."""
    weights: list[Tensor] = []

    def record(module: nn.Module, inputs: tuple[Tensor, Tensor], _: Tensor) -> None:
        assert isinstance(module, Attention), "only cross-attentions have the hook"
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
    """queries (B, K, W), context (B, S, W) -> (B, heads, K, S): the weights that the module never makes itself."""
    query, key = (part.unflatten(-1, (attention.heads, -1)).transpose(1, 2).float()
                  for part in (attention.query(queries), attention.key(context)))
    return (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1)


def per_image(weights: Grid, *, side: int) -> Grid:
    """weights (B, X, 2N or 3N) -> (B, X, 2, P, P): a difference is read at the same place of both images, half each."""
    views = weights.reshape(*weights.shape[:2], -1, side, side)  # before, after and perhaps difference
    return views[:, :, :2] + views[:, :, 2:].sum(2, keepdims=True) / 2


def pixel_change(images: Tensor, *, side: int) -> Grid:
    """images (B, 2, 3, H, W) -> (B, P, P), the mean difference in each patch."""
    difference = (images[:, 1] - images[:, 0]).double().abs().mean(1)  # (B, H, W)
    px = difference.shape[-1] // side
    patches = difference[:, : side * px, : side * px].unflatten(2, (side, px)).unflatten(1, (side, px))
    return patches.mean((2, 4)).numpy()


# --- the changed region ----------------------------------------------------------------------------------------------


def regions(row: PairRow) -> dict[str, Box]:
    """Side -> box of what changed, where the provenance has it. The region of a crop is what stayed."""
    if row["change_type"] in ("none", "crop"):
        return {}
    provenance = row["provenance"]
    boxes = {side: provenance.get(f"region_{side}") or provenance.get("region") for side in SIDES}
    return {side: box for side, box in boxes.items() if box}


def on_the_grid(box: Box, size: tuple[int, int], *, side: int) -> tuple[float, ...]:
    """A box in pixels of an image of this width and height -> in patches of the square it is padded to."""
    longer = max(size)
    margins = [(longer - length) / 2 for length in size]
    return tuple((value + margins[axis % 2]) * side / longer for axis, value in enumerate(box))


def coverage(box: Sequence[float], *, side: int) -> Grid:
    """box in patches -> (P, P): which share of each patch lies inside."""
    left, top, right, bottom = box
    starts = np.arange(side)
    across, down = (np.clip(np.minimum(starts + 1, high) - np.maximum(starts, low), 0, 1)
                    for low, high in ((left, right), (top, bottom)))
    return down[:, None] * across[None, :]


def points_inside(grid: Grid, box: Sequence[float]) -> bool:
    """Whether the middle of the patch with the highest value lies in the box (in patches); the first of equal ones."""
    row, column = np.unravel_index(int(grid.argmax()), grid.shape)
    return _inside(column + 0.5, row + 0.5, box)


def _inside(x: float, y: float, box: Sequence[float]) -> bool:
    left, top, right, bottom = box
    return bool(left <= x < right and top <= y < bottom)


# --- figures ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RegionFigures:
    """The figures of one image of a changed pair: name -> outcome."""

    group: str
    change_type: str
    side: str
    figures: dict[str, float]


def region_figures(record: Record, maps: AttentionMaps) -> list[RegionFigures]:
    """Those of each image of the pair that shows a known region. Raises ValueError for a broken image."""
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
            # A region smaller than a patch may hold the middle of none.
            "pointing_ceiling": any(_inside(x, y, place) for x in middles for y in middles),
            **{f"level_{level}_inside_share": _share(each, inside) for level, each in levels.items()},
            **{f"level_{level}_pointing_accuracy": points_inside(each, place) for level, each in levels.items()}}
        images.append(RegionFigures(record.group_id, record.change_type, name, figures))
    return images


def _share(grid: Grid, inside: Grid) -> float:
    total = float(grid.sum())
    return float((grid * inside).sum()) / total if total else 0.0


def attention_figures(images: Sequence[RegionFigures]) -> dict[str, Any]:
    """Means over images that show a changed region, with 95 % intervals; {} where there are none.

    attention_share: how much of the pair's attention the image gets; the other image gets the rest.
    inside_share: how much of the attention that an image gets falls into its region, beside the region's share of the
    image (area_share: what looking everywhere alike would give) and the share of the pixel differences that do.
    pointing_accuracy: the patch looked at most has its middle in the region; beside it the same of the patch that
    differs most, of the image's centre, and how many regions hold the middle of any patch (pointing_ceiling).
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
    """Every record with its maps, a batch at a time. Raises ValueError for a broken image."""
    for start in range(0, len(records), BATCH):
        batch = records[start : start + BATCH]
        pairs = [(open_image(record.before), open_image(record.after)) for record in batch]
        yield from zip(batch, attention_maps(captioner, pairs), strict=True)
