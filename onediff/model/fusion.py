"""Fusion: compare the pixels of both images place by place, before the delta tokens compress what the images show.

The paper's Visual Delta Module reads only patches of a pretrained vision tower. Fusion adds a small convolutional stem
that is trained on the pixels. Its features and those of the tower are compared and matched between the two images, and
joined to one map of the pair. The delta tokens and, in token layout C, the language model read this map.

Shapes:  P pairs, F channels of the stem, S cells of 4 pixels per side of its map, G places per side of the joined map,
         Q = G * G places, L levels of the vision tower, N patches per image, C width of the vision tower, W width of
         the joined map, D width of the delta tokens, A attributes.
"""

from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from onediff.model.changed_object import ChangedObject
from onediff.model.configuration import OneDiffConfig
from onediff.model.delta import SPREAD, PatchMatch
from onediff.model.motion import FLOW, Motion
from onediff.model.registration import READ, Registration

CELL_PX = 4  # width of a cell of the stem's map, which has two convolutions of stride 2
GROUPS = 8  # number of groups of channels that GroupNorm normalizes apart
COLORS = 6  # mean and standard deviation of red, green and blue in a place


class Fused(NamedTuple):
    """What Fusion gives for P pairs.

    It is a tuple, because ZeRO level 3 finds the tensors in the output of a module only in tuples, lists and dicts. At
    these tensors it starts to gather the parameters that the module needs in its backward pass.

    `cells` (P, 2 images, F, S, S) are the maps of the stem, and `joined` (P, W, G, G) is the map of the pair.
    `keys` (P, N, D) and `patches` (P, N, W) are this map on the patch grid of the vision tower: for the delta
    tokens, and for the language model. `tokens` (P, 2, D) describe the changed object and the camera motion.
    `places` (P, 2 images, G, G) are logits of "this place lies in the changed region", `changed` (P,) is the logit
    of "something changed", and `attributes` are the logits (P, classes + 1) of each attribute.
    """

    cells: Tensor
    joined: Tensor
    keys: Tensor
    patches: Tensor
    tokens: Tensor
    places: Tensor
    changed: Tensor
    attributes: list[Tensor]


class Stem(nn.Module):
    """Convolutions on the pixels that keep small details: one cell of the map for 4 x 4 pixels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        low = (channels + 1) // 2
        self.first, self.second = convolution(3, low, 5, stride=2), convolution(low, channels, 3, stride=2)

    def forward(self, images: Tensor) -> Tensor:
        """Return the maps (M images, F, S, S) of images (M, 3, height, width)."""
        return self.second(self.first(images))


class Residual(nn.Module):
    """Add the output of one 3 x 3 convolution to its input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.change = convolution(channels, channels, 3, stride=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the shape of `x` (M, channels, rows, columns)."""
        return x + self.change(x)


def convolution(inputs: int, outputs: int, side: int, *, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, side, stride, side // 2, bias=False),
                         nn.GroupNorm(gcd(GROUPS, outputs), outputs), nn.GELU())


class Comparison(nn.Module):
    """Five views of a pair of maps: both maps, their difference, and what has no match in the other map."""

    def __init__(self, channels: int, side: int, *, spacing: float = 1.0) -> None:
        super().__init__()
        self.norm, self.match = nn.LayerNorm(channels), PatchMatch(side, spacing=spacing)

    def forward(self, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
        """Return the normalized features (P, 2, places, channels) and the views (P, places, 5 * channels).

        The views are before, after, after - before, before - match, and after - match. The inputs are (P, places,
        channels).
        """
        before, after = self.norm(before), self.norm(after)
        views = [before, after, after - before, *self.match(before, after)]
        return torch.stack([before, after], 1), torch.cat(views, -1)


def masked_mean(mask: Tensor, features: Tensor) -> Tensor:
    """Return the mean features of each image (P, 2, E), weighted by the mask (P, 2, places) of this image.

    The features are (P, 2, places, E).
    """
    return (mask[:, :, None] @ features)[:, :, 0]


class Fusion(nn.Module):
    """The stem, the comparison of both images, the joined map, and what is read from this map.

    `to_patches` (N, Q) averages places to patches, and `to_places` (Q, N) interpolates patches to places.
    """

    to_patches: Tensor
    to_places: Tensor

    def __init__(self, config: OneDiffConfig) -> None:
        super().__init__()
        assert config.delta_fusion is not None, "a model without fusion must not build this module"
        channels, width, self.side = (config.delta_fusion[key] for key in ("channels", "width", "places"))
        tower, delta, per_side = config.vision_config.hidden_size, config.delta_width, config.patches_per_side
        levels = sorted(set(config.delta_levels))
        self.levels = [config.read_levels.index(level) for level in levels]
        self.stem = Stem(channels)
        self.coarser = nn.Sequential(
            convolution(channels, channels, 3, stride=config.vision_config.image_size // CELL_PX // self.side),
            Residual(channels))
        self.compare_stem = Comparison(channels, self.side, spacing=per_side / self.side)
        self.compare_tower = nn.ModuleList([Comparison(tower, per_side) for _ in levels])
        self.motion, self.registration = Motion(self.side), Registration()
        self.join_stem = nn.Linear(5 * channels + 3 * COLORS + 2 * FLOW, width)
        self.join_camera = nn.Linear(2 * READ, width, bias=False)
        self.join_tower = nn.Linear(5 * tower * len(levels), width, bias=False)
        self.positions = nn.Parameter(SPREAD * torch.randn(width, self.side, self.side))
        self.mix = nn.Sequential(*(Residual(width) for _ in range(config.delta_fusion["blocks"])))
        self.norm = nn.GroupNorm(1, width)
        self.places = nn.Conv2d(width, 2, 1)
        self.object = ChangedObject(channels + tower * len(levels), width, delta, side=self.side,
                                    classes=config.delta_classes)
        self.keys = nn.Linear(width, delta)
        # A product with a matrix is faster than the resampling functions of PyTorch, and gives equal values.
        places, patches = (torch.eye(side**2).unflatten(0, (1, -1)).unflatten(2, (side, side))
                           for side in (self.side, per_side))
        self.register_buffer("to_patches", functional.adaptive_avg_pool2d(places, per_side)[0].flatten(1).T)
        self.register_buffer("to_places", functional.interpolate(
            patches, size=(self.side, self.side), mode="bilinear", align_corners=False)[0].flatten(1).T)

    def forward(self, images: Tensor, before: Tensor, after: Tensor) -> Fused:
        """Compare the images (P, 2, 3, height, width), whose hidden states in the tower are (P, L, N, C) each."""
        cells = self.stem(images.flatten(0, 1)).unflatten(0, (-1, 2))  # (P, 2, F, S, S)
        seen, views = self.compare_pixels(images, cells)
        camera = self.registration(images).flatten(1)  # (P, 2 * READ)
        seen_tower, views_tower = zip(*(compare(before[:, level], after[:, level]) for level, compare in
                                        zip(self.levels, self.compare_tower, strict=True)), strict=True)
        tower = self.to_places @ self.join_tower(torch.cat(views_tower, -1))  # (P, Q, W)
        mixed = self.join_stem(views) + tower + self.join_camera(camera)[:, None]
        mixed = mixed.transpose(1, 2).unflatten(2, (self.side, self.side))
        joined = self.norm(self.mix(functional.gelu(mixed + self.positions)))
        by_place = joined.flatten(2).transpose(1, 2)  # (P, Q, W)
        patches, places = self.to_patches @ by_place, self.places(joined)
        mask = places.flatten(2).softmax(-1)  # (P, 2, Q)
        features = torch.cat([masked_mean(mask, seen),
                              masked_mean(mask @ self.to_places, torch.cat(seen_tower, -1))], -1)
        tokens, changed, attributes = self.object(features, by_place, places.flatten(2), camera)
        return Fused(cells, joined, self.keys(patches), patches, tokens, places, changed, attributes)

    def compare_pixels(self, images: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the stem sees in each place, (P, 2, Q, F), and its views with color and motion.

        The views are (P, Q, inputs of `join_stem`).
        """
        coarse = self.coarser(cells.flatten(0, 1)).flatten(2)  # (2P, F, Q)
        before, after = coarse.transpose(1, 2).unflatten(0, (-1, 2)).unbind(1)
        seen, views = self.compare_stem(before, after)
        flow = self.motion(seen[:, 0], seen[:, 1])
        first, second = self.colors(images).unbind(1)
        return seen, torch.cat([views, first, second, second - first, flow], -1)

    def colors(self, images: Tensor) -> Tensor:
        """Return mean and standard deviation of the colors in each place of images (P, 2, 3, H, W), (P, 2, Q, COLORS).

        They keep the brightness and the contrast, which the norms of the stem remove.
        """
        pixels = images.flatten(0, 1).float()  # In bfloat16, the difference of squares below would be mostly rounding.
        mean, square = (functional.adaptive_avg_pool2d(values, self.side) for values in (pixels, pixels.square()))
        spread = (square - mean.square()).clamp(min=0).add(1e-6).sqrt()
        colors = torch.cat([mean, spread], 1).to(images.dtype)  # (2P, COLORS, G, G)
        return colors.flatten(2).transpose(1, 2).unflatten(0, (-1, 2))

