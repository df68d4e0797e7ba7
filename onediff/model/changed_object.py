"""The changed object: a token that describes it, the attributes of the change, and a word for each attribute.

The auxiliary losses of training compare this description with what the generator of a pair recorded.

Shapes:  P pairs, Q places per image, E channels of the features of an image, W width of the joined map, D width of the
         delta tokens, A attributes.
"""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from onediff.inputs.processing import IGNORED
from onediff.model.motion import middles
from onediff.model.registration import READ

SQUARES = 4  # squares per side of the image, in which the place of the changed object is described


class AttributeTokens(nn.Module):
    """Tell the language model each attribute of the change in one token.

    The token is the mean of the embeddings of all classes of the attribute, such as "red" and "blue", weighted by their
    probability. So the language model can copy the word that Fusion has read, as it copies words of a text. The last
    probability belongs to no word: it states that the change has no such attribute.
    `words` (all tokens of all words) are the token ids, and `means` (all classes, all tokens) averages the tokens of
    each word.
    """

    words: Tensor
    means: Tensor

    def __init__(self, classes: Mapping[str, Mapping[str, Sequence[int]]], width: int) -> None:
        super().__init__()
        self.sizes = [len(options) for options in classes.values()]
        texts = [list(ids) for options in classes.values() for ids in options.values()]
        self.register_buffer("words", torch.tensor([token for ids in texts for token in ids]))
        self.register_buffer("means", torch.block_diag(*(torch.full((1, len(ids)), 1 / len(ids)) for ids in texts)))
        self.marks = nn.Parameter(torch.zeros(len(classes), width))

    def forward(self, attributes: Sequence[Tensor], embedding: nn.Module) -> Tensor:
        """Return the tokens (P, A, width of the language model) for the logits (P, classes + 1) of each attribute.

        `embedding` is the embedding table of the language model.
        """
        words = self.means.to(attributes[0].dtype) @ embedding(self.words).to(attributes[0].dtype)  # (all classes, D)
        return self.marks + torch.stack([logits.softmax(-1)[:, :-1] @ vectors for logits, vectors in
                                         zip(attributes, words.split(self.sizes), strict=True)], 1)


class ChangedObject(nn.Module):
    """Read the features of both images where the change is, and describe the changed object.

    `to_position` (Q, SQUARES * SQUARES + 2) adds up the places in each square of the image, and gives the middle (x, y)
    of all places, from -1 to 1.
    """

    to_position: Tensor

    def __init__(self, features: int, joined: int, width: int, *, side: int,
                 classes: Mapping[str, Collection[str]]) -> None:
        super().__init__()
        # Two sides with features, joined features, squares, middle and a logit; the summary of the map; the probability
        # of a change; the numbers of Registration.
        inputs = 2 * (features + joined + SQUARES**2 + 3) + 2 * joined + 1 + 2 * READ
        self.describe = perceptron(inputs, 2 * width, width)
        self.changed = nn.Linear(2 * joined, 1)
        self.camera = nn.Linear(2 * READ, width)
        # Each attribute has a perceptron of its own, because a shared one hardly learned attributes of few pairs.
        self.attributes = nn.ModuleList([perceptron(inputs, width, len(options) + 1) for options in classes.values()])
        self.marks = nn.Parameter(0.3 * torch.randn(2, width))
        number = torch.arange(side) * SQUARES // side
        square = (SQUARES * number[:, None] + number).flatten()
        squares = functional.one_hot(square, SQUARES**2).float()
        self.register_buffer("to_position", torch.cat([squares, middles(side)], 1))

    def forward(self, features: Tensor, joined: Tensor, places: Tensor,
                camera: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return tokens (P, 2, D), the logit of "something changed" (P,), and logits (P, classes + 1) per attribute.

        The tokens are the object and the camera motion. The last logit of an attribute means that there is none.
        `features` (P, 2 images, E) are the mean features of each image under the mask that the place logits give, which
        is their softmax. `joined` is the map of Fusion (P, Q, W), `places` has the logits of the changed places
        (P, 2, Q), and `camera` (P, 2 * READ) the numbers of Registration.
        """
        mask = places.softmax(-1)  # (P, 2, Q)
        where, strength = mask @ self.to_position.to(mask.dtype), places.amax(-1, keepdim=True)
        summary = torch.cat([joined.mean(1), joined.amax(1)], -1)  # (P, 2W)
        sides = torch.cat([features, mask @ joined, where, strength], -1).flatten(1)
        changed = self.changed(summary)  # (P, 1)
        seen = torch.cat([sides, summary, changed.sigmoid(), camera], -1)
        tokens = torch.stack([self.describe(seen), self.camera(camera)], 1) + self.marks
        return tokens, changed[:, 0], [attribute(seen) for attribute in self.attributes]


def perceptron(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, outputs))


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

    `logits` has one tensor (P, classes + 1) per attribute. `classes` (P, A) holds class numbers, the number of classes
    for an attribute that the change does not have, or IGNORED.
    """
    each = torch.stack([functional.cross_entropy(scores.float(), classes[:, number], ignore_index=IGNORED,
                                                 reduction="none") for number, scores in enumerate(logits)], 1)
    return (each.sum(1) / (classes != IGNORED).sum(1).clamp(min=1)).sum()
