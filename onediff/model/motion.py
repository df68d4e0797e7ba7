"""Motion: where the content of each place went between the two images.

Shapes:  P pairs, Q places per image, C channels.
"""

import torch
from torch import Tensor, nn

FLOW = 3  # numbers that describe the motion of one place in one direction


class Motion(nn.Module):
    """Match each place of one image with all places of the other image.

    Unlike `PatchMatch`, the match does not prefer near places, so that it also finds content after a large motion.
    `positions` (Q, 2) are the middles (x, y) of the places, from -1 to 1; x points right and y points down.
    """

    positions: Tensor

    def __init__(self, side: int) -> None:
        super().__init__()
        self.sharpness = nn.Parameter(torch.tensor([2.0]))
        self.register_buffer("positions", middles(side))

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        """Return the flow of each place (P, Q, 2 * FLOW): first from `before` to `after`, then the flow back.

        `before` and `after` are normalized features (P, Q, C). The flow of a place is its displacement (x, y), and the
        confidence: the probability, from 0 to 1, that the match of the match is this place again.
        """
        similarity = (self.sharpness * before @ after.transpose(1, 2) / before.shape[-1] ** 0.5).float()
        there, back = similarity.softmax(-1), similarity.softmax(1)  # (P, Q before, Q after)
        both, positions = there * back, self.positions.float()
        return torch.cat([there @ positions - positions, both.sum(2)[..., None],
                          back.transpose(1, 2) @ positions - positions, both.sum(1)[..., None]], -1).to(before.dtype)


def middles(side: int) -> Tensor:
    """Return the middle (x, y) of each place, (side * side, 2), from -1 to 1; x points right and y points down."""
    middle = (torch.arange(side) + 0.5) * 2 / side - 1
    y, x = torch.meshgrid(middle, middle, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], 1)
