"""Attention maps: how much attention the delta tokens of a model give to each place of both images.

A map shows the cross-attention of the Visual Delta Module, averaged over delta tokens and heads.

Shapes:  B pairs, X cross-attention layers, P patches per image side, N = P * P patches per image, K delta tokens,
         W width of the module, S keys: N for each view (before, after, and, in some models, the difference or the
         joined map of both images).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from onediff.model.captioner import Captioner
from onediff.model.delta import Attention, DeltaLayer, VisualDeltaModule

Grid = NDArray[np.float64]


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
    pixels = images.to(model.device)
    states = model.vision(pixels).to(delta.tokens.dtype)
    fused = model.fuse(pixels, states, torch.full((len(pairs),), 2, device=model.device))
    with recorded(delta) as weights:
        delta(states[::2], states[1::2], fused and fused.keys)
    side, read = model.config.patches_per_side, np.array(model.config.delta_levels)
    by_image = per_image(torch.stack(weights, 1).double().cpu().numpy(), side=side)  # (B, X, 2, P, P)
    change = pixel_change(images.unflatten(0, (-1, 2)), side=side)
    return [AttentionMaps(before=maps.mean(0)[0], after=maps.mean(0)[1], change=difference,
                          levels={int(level): maps[read == level].mean(0) for level in np.unique(read)})
            for maps, difference in zip(by_image, change, strict=True)]


def heat_maps(captioner: Captioner, before: Image.Image, after: Image.Image) -> tuple[Grid, Grid]:
    """Return the attention on each place of the before image and of the after image, each (P, P).

    Both maps have one scale: 1 is the highest attention on any place of the two images, and 0 is no attention. The
    model pads an image to a square, and the maps cover this square. Raises the error of `attention_maps`.
    """
    maps = attention_maps(captioner, [(before, after)])[0]
    highest = max(maps.before.max(), maps.after.max())
    return maps.before / highest, maps.after / highest


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
    models also on the differences between these patches or on the joined map of Fusion. Half of the attention on a
    place of a view that both images share is added to each image.
    """
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
