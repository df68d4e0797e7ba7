"""Registration: how well the two images agree after each of a fixed set of camera motions.

The correlation of pixels after a turn by 90 degrees, or after a zoom into a part of the image, tells a rotation or a
crop at once, whereas features that see the position and the size of a pattern hardly match after such a motion.

Shapes:  P pairs, M camera motions, R and V pixels per side of the image before and after the motion.
"""

from itertools import product

import torch
from torch import Tensor, nn
from torch.nn import functional

IMAGE_PX, VIEW_PX = 24, 12  # R and V
QUARTERS = (0, 1, 3)  # numbers of turns by 90 degrees counter-clockwise
SIDES = (0.5, 0.58, 0.66)  # sides of the windows of the zooms, in shares of the image
STEPS = (0.0, 0.5, 1.0)  # where the free space beside a window is: all after it, divided equally, all before it
NUM_MOTIONS = len(QUARTERS) + len(SIDES) * len(STEPS) ** 2
READ = 8  # numbers that Registration gives for one direction
SMALL = 1e-3  # keeps the correlation of images without contrast finite


class Registration(nn.Module):
    """Compare the images after camera motions: rest, quarter turns, and zooms into windows of the image.

    `views` (M, V * V, R * R) are the matrices that resample an image. `meaning` (M, READ - 2) describes each motion by
    0 or 1 for rest, a turn to the left, a turn to the right and a zoom, and by the place (x, y) of the window of a
    zoom, from -1 to 1; x points right and y points down.
    """

    views: Tensor
    meaning: Tensor

    def __init__(self) -> None:
        super().__init__()
        windows = [(0.0, 0.0, 1.0, turn) for turn in QUARTERS]
        zooms = list(product(SIDES, STEPS, STEPS))
        windows += [(x * (1 - side), y * (1 - side), side, 0) for side, x, y in zooms]
        self.register_buffer("views", torch.stack([view_matrix(*window) for window in windows]))
        turns = [[float(turn == other) for other in QUARTERS] + [0.0] * 3 for turn in QUARTERS]
        places = [[0.0] * len(QUARTERS) + [1.0, 2 * x - 1, 2 * y - 1] for _, x, y in zooms]
        self.register_buffer("meaning", torch.tensor(turns + places))
        self.sharpness = nn.Parameter(torch.tensor([40.0]))

    def forward(self, images: Tensor) -> Tensor:
        """Return what the camera did (P, 2 directions, READ) between the images (P, 2, 3, height, width).

        In the first direction the motion leads from before to after, in the second from after to before. The numbers
        are the correlation without a motion, the highest correlation, and the mean of `meaning` over the motions. Its
        weights are the softmax of the correlations over both directions and all motions.
        """
        scores = self.correlations(images)
        likely = (self.sharpness.float() * scores.flatten(1)).softmax(-1).view_as(scores)
        best = torch.stack([scores[..., 0], scores.amax(-1)], -1)
        return torch.cat([best, likely @ self.meaning.float()], -1).to(images.dtype)

    def correlations(self, images: Tensor) -> Tensor:
        """Return the correlations of the images after each motion, (P, 2 directions, M), from -1 to 1."""
        with torch.no_grad():
            small, plain = (functional.adaptive_avg_pool2d(images.flatten(0, 1).float(), px).flatten(2)
                            for px in (IMAGE_PX, VIEW_PX))
            # One product for all motions. A batched product would first copy the matrices for each image.
            moved = small @ self.views.float().flatten(0, 1).T  # (2P, 3, M * V * V)
            moved = normalized(moved.unflatten(2, (NUM_MOTIONS, -1)).transpose(1, 2).unflatten(0, (-1, 2)))
            target = normalized(plain.unflatten(0, (-1, 2)).flip(1)[:, :, None])  # the other image of each pair
            return (moved * target).sum((-2, -1))


def view_matrix(left: float, top: float, side: float, quarters: int) -> Tensor:
    """Return the matrix (V * V, R * R) that resamples a square window of an image and turns it.

    The window is in shares of the image, and the number of quarter turns is counter-clockwise.
    """
    middles = (torch.arange(VIEW_PX) + 0.5) * side / VIEW_PX
    grid = torch.stack(torch.meshgrid(2 * (left + middles) - 1, 2 * (top + middles) - 1, indexing="xy"), -1)
    pixels = torch.eye(IMAGE_PX**2).view(1, -1, IMAGE_PX, IMAGE_PX)
    return functional.grid_sample(pixels, grid.rot90(quarters)[None], align_corners=False)[0].flatten(1).T


def normalized(views: Tensor) -> Tensor:
    """Subtract the mean of each color, and divide by the length of all colors, (..., 3, pixels)."""
    centered = views - views.mean(-1, keepdim=True)
    return centered / (centered.square().sum((-2, -1), keepdim=True) + SMALL).sqrt()
