"""The changed object: a token that describes it, and one token for each of its attributes, such as its color.

The auxiliary losses of training compare this description with what the generator of a pair recorded.

Shapes:  P pairs, Q places per image, E channels of the features of an image, W width of the joined map, D width of the
         delta tokens, A attributes.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from onediff.inputs.processing import IGNORED
from onediff.model.motion import CAMERA


class Attribute(nn.Module):
    """One attribute of the changed object: the logits of its classes, and a token for the classes that they favour."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.classes = nn.Parameter(torch.randn(num_classes, width) / width**0.5)
        self.bias = nn.Parameter(torch.zeros(num_classes))

    def forward(self, thing: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (P, classes) and the token (P, D): the mean of the class vectors, weighted by probability.

        `thing` is the token of the changed object (P, D).
        """
        logits = functional.linear(thing, self.classes, self.bias)
        return logits, logits.softmax(-1) @ self.classes


class ChangedObject(nn.Module):
    """Read the features of both images where the change is, and describe the changed object."""

    def __init__(self, features: int, joined: int, width: int, classes: Mapping[str, Sequence[str]]) -> None:
        super().__init__()
        # Two sides with features, joined features, a middle and a logit; the summary of the map; the probability of a
        # change; two camera motions.
        inputs = 2 * (features + joined + 3) + 2 * joined + 1 + 2 * CAMERA
        self.describe = nn.Sequential(nn.Linear(inputs, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.changed = nn.Linear(2 * joined, 1)
        self.camera = nn.Linear(2 * CAMERA, width)
        self.attributes = nn.ModuleDict({name: Attribute(width, len(options)) for name, options in classes.items()})
        self.copy = nn.Linear(width, width)
        self.marks = nn.Parameter(0.3 * torch.randn(2 + len(classes), width))

    def forward(self, features: Tensor, joined: Tensor, places: Tensor, positions: Tensor,
                camera: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return tokens (P, 2 + A, D), the logit of "something changed" (P,), and logits (P, classes) per attribute.

        The tokens are the object, the camera motion, and the attributes. `features` (P, 2 images, E) are the mean
        features of each image under the mask that the place logits give, which is their softmax. `joined`
        is the map of Fusion (P, Q, W), `places` has the logits of the changed places (P, 2, Q), `positions` is (Q, 2)
        and `camera` is (P, 2 * CAMERA).
        """
        mask = places.softmax(-1)  # (P, 2, Q)
        middle, strength = mask @ positions.to(mask.dtype), places.amax(-1, keepdim=True)
        summary = torch.cat([joined.mean(1), joined.amax(1)], -1)  # (P, 2W)
        sides = torch.cat([features, mask @ joined, middle, strength], -1).flatten(1)
        changed = self.changed(summary)  # (P, 1)
        thing = self.describe(torch.cat([sides, summary, changed.sigmoid(), camera], -1))
        read = [attribute(thing) for attribute in self.attributes.values()]
        named = self.copy(torch.stack([token for _, token in read], 1))
        tokens = torch.cat([torch.stack([thing, self.camera(camera)], 1), named], 1) + self.marks
        return tokens, changed[:, 0], [logits for logits, _ in read]


def place_loss(logits: Tensor, shares: Tensor) -> Tensor:
    """Return the sum over pairs of the mean binary cross-entropy over the places of both images.

    `logits` and `shares` are (P, 2, Q). A share from 0 to 1 states how much of the place the changed region covers;
    IGNORED states that this is unknown.
    """
    known = shares != IGNORED
    each = functional.binary_cross_entropy_with_logits(logits.float(), shares.clamp(min=0), reduction="none")
    return (each * known).mean((1, 2)).sum()


def changed_loss(logits: Tensor, changed: Tensor) -> Tensor:
    """Return the sum over pairs of the binary cross-entropy of "something changed"; both inputs are (P,).

    `changed` is 1, 0, or IGNORED if it is unknown.
    """
    each = functional.binary_cross_entropy_with_logits(logits.float(), changed.clamp(min=0), reduction="none")
    return (each * (changed != IGNORED)).sum()


def object_loss(logits: Sequence[Tensor], classes: Tensor) -> Tensor:
    """Return the sum over pairs of the mean cross-entropy over those attributes of the pair that are known.

    `logits` has one tensor (P, classes) per attribute, and `classes` (P, A) holds class numbers or IGNORED.
    """
    each = torch.stack([functional.cross_entropy(scores.float(), classes[:, number], ignore_index=IGNORED,
                                                 reduction="none") for number, scores in enumerate(logits)], 1)
    return (each.sum(1) / (classes != IGNORED).sum(1).clamp(min=1)).sum()
