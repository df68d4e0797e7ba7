"""Motion: where the content of each place went, and how the camera moved between the two images.

Positions are pairs (x, y) from -1 to 1, where x points right and y points down. A camera motion maps the position z of
a point in one image to its position a * z + b in the other image, with a = (a_x, a_y) and b as complex numbers: b is
the shift, the length of a is the growth, and the angle of a is the turn (clockwise, because y points down).

Shapes:  P pairs, Q places per image, C channels.
"""

import torch
from torch import Tensor, nn

ROUNDS = 3  # number of fits of the camera motion; each fit gives less weight to the outliers of the fit before
TOLERANCE = 0.2  # distance from the camera motion, in units of half the image, at which the weight of a place is halved
SMALL = 1e-4  # keeps a division by the sum of all weights, or by their spread, finite
CAMERA, FLOW = 4, 5  # numbers that describe one camera motion, and one place, in one direction


class Motion(nn.Module):
    """Match each place of one image with all places of the other image, and fit the motion of the camera.

    Unlike `PatchMatch`, the match does not prefer near places, so that it also finds content after a turn or a crop.
    """

    positions: Tensor

    def __init__(self, side: int) -> None:
        super().__init__()
        self.sharpness = nn.Parameter(torch.tensor([2.0]))
        middles = (torch.arange(side) + 0.5) * 2 / side - 1
        y, x = torch.meshgrid(middles, middles, indexing="ij")
        self.register_buffer("positions", torch.stack([x.flatten(), y.flatten()], 1))  # (Q, 2)

    def forward(self, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
        """Return the flow of each place, (P, Q, 2 * FLOW), and the camera motions, (P, 2 * CAMERA).

        Both hold first the motion from `before` to `after` and then the motion back. `before` and `after` are
        normalized features (P, Q, C). The flow of a place is its displacement (x, y), the part of the displacement
        that the camera does not explain (x, y), and the confidence: the probability, from 0 to 1, that the match of
        the match is this place again. A camera motion is (a_x - 1, a_y, b_x, b_y), so that a resting camera gives
        zeros.
        """
        similarity = (self.sharpness * before @ after.transpose(1, 2) / before.shape[-1] ** 0.5).float()
        there, back = similarity.softmax(-1), similarity.softmax(1)  # (P, Q before, Q after)
        both = there * back
        flow, camera = self.track(there, both.sum(2))
        flow_back, camera_back = self.track(back.transpose(1, 2), both.sum(1))
        return (torch.cat([flow, flow_back], -1).to(before.dtype),
                torch.cat([camera, camera_back], -1).to(before.dtype))

    def track(self, weights: Tensor, confidence: Tensor) -> tuple[Tensor, Tensor]:
        """Return flow (P, Q, FLOW) and camera motion (P, CAMERA).

        `weights` (P, Q, Q) are the probabilities of the matches of each place, and `confidence` is (P, Q).
        """
        positions = self.positions.float()
        found = weights @ positions  # (P, Q, 2): the mean position of the match
        camera = fit_camera(positions, found, confidence)
        moved = found - positions
        unexplained = found - positions_after(camera, positions)
        return torch.cat([moved, unexplained, confidence[..., None]], -1), camera


def fit_camera(start: Tensor, end: Tensor, weights: Tensor) -> Tensor:
    """Fit the camera motion (P, CAMERA) that maps the positions `start` (Q, 2) to `end` (P, Q, 2) best.

    This is a least-squares fit with `weights` (P, Q), repeated with less weight for places that it does not explain,
    such as a moved object.
    """
    camera, robust = weights.new_zeros(len(weights), CAMERA), weights
    for _ in range(ROUNDS):
        share = robust / (robust.sum(1, keepdim=True) + SMALL)
        from_, to = (share[..., None] * start).sum(1, keepdim=True), (share[..., None] * end).sum(1, keepdim=True)
        (x, y), (u, v) = (start - from_).unbind(-1), (end - to).unbind(-1)  # each (P, Q)
        spread = (share * (x.square() + y.square())).sum(1) + SMALL
        scale = (share * (x * u + y * v)).sum(1) / spread
        turn = (share * (x * v - y * u)).sum(1) / spread
        (mean_x, mean_y), (mean_u, mean_v) = from_[:, 0].unbind(-1), to[:, 0].unbind(-1)
        camera = torch.stack([scale - 1, turn, mean_u - scale * mean_x + turn * mean_y,
                              mean_v - turn * mean_x - scale * mean_y], 1)
        distance = (end - positions_after(camera, start)).square().sum(-1)
        robust = weights / (1 + distance / TOLERANCE**2)
    return camera


def positions_after(camera: Tensor, positions: Tensor) -> Tensor:
    """Return where a camera motion (P, CAMERA) moves each of the positions (Q, 2), as (P, Q, 2)."""
    scale, turn, shift_x, shift_y = (value[:, None] for value in (camera[:, 0] + 1, *camera[:, 1:].unbind(1)))
    x, y = positions.unbind(-1)
    return torch.stack([scale * x - turn * y + shift_x, turn * x + scale * y + shift_y], -1)
