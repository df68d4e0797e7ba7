"""Train the Siamese CNN on the training pairs of DiffCap, in a plain loop on one device."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from onediff.baselines.siamese_cnn import PAD, Architecture, SiameseCaptioner, SiameseCNN, Vocabulary, pixels
from onediff.data.record import digest, read_records
from onediff.inputs.images import open_image

Validate = Callable[[SiameseCaptioner], float]  # higher is better
Log = Callable[[int, dict[str, float]], None]


@dataclass(frozen=True)
class Training:
    """Settings for training the Siamese CNN.

    The captioner is validated every `validate_every` steps, and the weights with the best score are kept.
    """

    steps: int = 3900
    batch_size: int = 32
    rate: float = 1e-3
    warmup: float = 0.03
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    validate_every: int = 500
    seed: int = 7


@dataclass(frozen=True)
class Pairs:
    """The image pairs of a split, in memory.

    `images` (M images, 3, height, width) has each distinct image once, with pixel values from 0 to 255. `places` has
    for each pair the two indices of the before and the after image in `images`. `references` has the captions of each
    pair.
    """

    images: Tensor
    places: Tensor
    references: list[list[str]]

    @classmethod
    def read(cls, folder: Path, split: str, *, image_px: int) -> Pairs:
        """Read all records with two images from a split of DiffCap. Raises ValueError if there are none."""
        images: dict[str, Tensor] = {}  # maps the digest of each image to its pixels
        names, references = [], []
        for record in read_records(folder, f"{split}-*.parquet"):
            if record.num_images == 2:
                names.append([digest(content) for content in record.images])
                references.append(record.references)
                images |= {name: pixels(open_image(content), image_px)
                           for name, content in zip(names[-1], record.images, strict=True) if name not in images}
        if not names:
            raise ValueError(f"{folder}: split {split} must contain at least one pair, got none; "
                             "'dvc repro' builds data/diffcap")
        place = {name: number for number, name in enumerate(images)}
        return cls(torch.stack([*images.values()]), torch.tensor([[place[name] for name in pair] for pair in names]),
                   references)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, rows: Sequence[int]) -> Tensor:
        """Return the images of the pairs with the given indices, (B pairs, 2, 3, height, width)."""
        return self.images[self.places[list(rows)]]


def fit(pairs: Pairs, architecture: Architecture, training: Training, *, validate: Validate,
        log: Log) -> SiameseCaptioner:
    """Train a captioner on the pairs, and return it with the weights that got the highest score from `validate`.

    The same seed gives the same weights. Raises ValueError if the loss becomes infinite or NaN.
    """
    torch.manual_seed(training.seed)
    vocabulary = Vocabulary.of(text for texts in pairs.references for text in texts)
    model = SiameseCNN(architecture, len(vocabulary.words))
    captioner = SiameseCaptioner(model, vocabulary)
    optimizer = torch.optim.AdamW(_decayed(model, training.weight_decay), lr=0.0)
    best_score, best_weights = -math.inf, model.state_dict()
    for step, (rows, captions) in enumerate(draws(pairs, training), start=1):
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = training.rate * rate_factor(step, training.steps, training.warmup)
        words = vocabulary.encode(captions, max_words=architecture.max_words)
        logits = model(pairs[rows], words[:, :-1])
        loss = functional.cross_entropy(logits.flatten(0, 1), words[:, 1:].flatten(), ignore_index=PAD)
        if not loss.isfinite():
            raise ValueError(f"siamese_cnn: the loss must be finite, got {loss.item()} at step {step}; "
                             "use a lower learning rate")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.clip_norm)
        optimizer.step()
        values = {"loss": loss.item()}
        if step % training.validate_every == 0 or step == training.steps:
            values["val"] = validate(captioner)
            if values["val"] > best_score:
                best_score, best_weights = values["val"], deepcopy(model.state_dict())
        log(step, values)
    model.load_state_dict(best_weights)
    return SiameseCaptioner(model.eval(), vocabulary)


def draws(pairs: Pairs, training: Training) -> Iterator[tuple[list[int], list[str]]]:
    """Yield for each training step the indices of the pairs in the batch, and one random caption of each pair.

    Each epoch visits all pairs once in random order. The caption of a pair is drawn again in each epoch.
    """
    generator = torch.Generator().manual_seed(training.seed)
    queue: list[int] = []
    for _ in range(training.steps):
        while len(queue) < training.batch_size:
            queue += torch.randperm(len(pairs), generator=generator).tolist()
        rows, queue = queue[: training.batch_size], queue[training.batch_size :]
        drawn = torch.rand(len(rows), generator=generator).tolist()
        yield rows, [pairs.references[row][int(share * len(pairs.references[row]))]
                     for row, share in zip(rows, drawn, strict=True)]


def rate_factor(step: int, steps: int, warmup: float) -> float:
    """Return the factor on the peak learning rate at a step: linear warmup, then a cosine decay to 0.

    `warmup` is the share of the steps that the warmup takes.
    """
    rising = max(1, round(steps * warmup))
    return step / rising if step <= rising else 0.5 * (1 + math.cos(math.pi * (step - rising) / (steps - rising)))


def _decayed(model: SiameseCNN, weight_decay: float) -> list[dict[str, object]]:
    """Return two optimizer parameter groups: one with weight decay (matrices and filters), and one without.

    The group without weight decay has the biases, the parameters of norms, the scalars and the position embeddings.
    """
    named = list(model.named_parameters())
    decayed = {name for name, value in named if value.dim() > 1 and name not in ("places", "turns")}
    matrices = [value for name, value in named if name in decayed]
    others = [value for name, value in named if name not in decayed]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
