"""Boxes in an image, and on a grid of square places that covers the image."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def on_the_grid(box: Sequence[float], size: tuple[int, int], *, side: int) -> tuple[float, ...]:
    """Convert a box from pixels of an image to units of patches.

    The vision encoder pads an image to a square, so the result is relative to this square. `size` is the width and
    height of the image, `side` is the number of patches per side of the square.
    """
    longer = max(size)
    margins = [(longer - length) / 2 for length in size]
    return tuple((value + margins[axis % 2]) * side / longer for axis, value in enumerate(box))


def coverage(box: Sequence[float], *, side: int) -> NDArray[np.float64]:
    """Return for each of the P x P patches which share of its area lies inside the box, (P, P).

    The edges of the box are given in units of patches.
    """
    left, top, right, bottom = box
    starts = np.arange(side)
    across, down = (np.clip(np.minimum(starts + 1, high) - np.maximum(starts, low), 0, 1)
                    for low, high in ((left, right), (top, bottom)))
    return down[:, None] * across[None, :]
