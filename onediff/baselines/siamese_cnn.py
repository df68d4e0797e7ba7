"""Siamese CNN: a baseline without pretrained parts and without a large language model.

A CNN encodes both images, and a small transformer decoder writes the caption word by word. All weights are trained from
random initialization in `siamese_training.py`. The model takes no instruction.

Shapes:  B pairs, S positions per side of a feature map, N = S * S, C channels, T words, W width, V words in the
         vocabulary.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import Literal, Self, get_args

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from onediff.files import read_json, write_json

PAD, BEGIN, END, UNKNOWN = range(4)
MARKS = ("<pad>", "<s>", "</s>", "<unk>")
STRIDE = 8  # distance, in pixels of the image, between two neighbouring positions of the feature map
WEIGHTS, SETTINGS = "model.safetensors", "siamese_cnn.json"
Comparison = Literal["same_place", "matched"]


@dataclass(frozen=True)
class Architecture:
    """Sizes of a Siamese CNN, and the method by which it compares the two images.

    The decoder always reads the features of both images and their difference at each position. If `comparison` is
    "matched", it also reads the difference between each position and the most similar positions of the other image,
    which helps if the camera moved (Shi et al., ECCV 2020).
    """

    image_px: int = 96
    channels: tuple[int, int, int] = (24, 32, 64)
    width: int = 128
    heads: int = 4
    layers: int = 3
    comparison: Comparison = "matched"
    max_words: int = 24

    def __post_init__(self) -> None:
        if self.image_px % (2 * STRIDE):
            raise ValueError(f"siamese_cnn: image_px must be a multiple of {2 * STRIDE}, got {self.image_px}")
        if self.comparison not in get_args(Comparison):
            raise ValueError(f"siamese_cnn: comparison must be one of {', '.join(get_args(Comparison))}, "
                             f"got {self.comparison!r}")


def words_of(caption: str) -> list[str]:
    return re.findall(r"[\w']+|[^\w\s]", caption.lower())


class Vocabulary:
    def __init__(self, words: Sequence[str]) -> None:
        self.words = [*MARKS, *words]
        self._number = {word: number for number, word in enumerate(self.words)}

    @classmethod
    def of(cls, captions: Iterable[str]) -> Vocabulary:
        """Create the vocabulary: all words of the captions, with the most frequent word first."""
        counts = Counter(word for caption in captions for word in words_of(caption))
        return cls(sorted(counts, key=lambda word: (-counts[word], word)))

    def encode(self, captions: Sequence[str], *, max_words: int) -> Tensor:
        """Return word ids (B captions, T ids): begin mark, at most `max_words` words, end mark, and padding."""
        rows = [[BEGIN, *(self._number.get(word, UNKNOWN) for word in words_of(caption)[:max_words]), END]
                for caption in captions]
        longest = max(map(len, rows))
        return torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])

    def decode(self, ids: Tensor) -> list[str]:
        """Return the captions for word ids (B captions, T ids). Words after the end mark are dropped."""
        rows = [list(takewhile(lambda number: number != END, row)) for row in ids.tolist()]
        return [" ".join(self.words[number] for number in row if number > UNKNOWN) for row in rows]


class Block(nn.Module):
    """Two convolutions with a residual connection. He et al., CVPR 2016."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first, self.second = convolution(inputs, outputs, 3, stride), convolution(outputs, outputs, 3, 1)
        self.around = convolution(inputs, outputs, 1, stride) if stride > 1 or inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.around(x) + self.second(functional.relu(self.first(x))))


def convolution(inputs: int, outputs: int, side: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, side, stride, side // 2, bias=False), nn.BatchNorm2d(outputs))


class FeatureMatch(nn.Module):
    """Subtracts, at each position of an image, the matching features of the other image.

    The matching features are a weighted mean over the other image; similar and near positions have more weight.
    """

    distances: Tensor

    def __init__(self, side: int, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.sharpness, self.nearness = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(0.3))
        places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).float()
        self.register_buffer("distances", torch.cdist(places, places).square(), persistent=False)  # (N, N)

    def forward(self, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
        """Return `before` minus its match in `after`, and `after` minus its match in `before`.

        Inputs and outputs are feature maps (B pairs, C channels, S rows, S columns).
        """
        shape = before.shape
        before, after = (self.norm(x.flatten(2).transpose(1, 2)) for x in (before, after))  # (B, N, C)
        similarity = self.sharpness * before @ after.transpose(1, 2) / shape[1] ** 0.5 - self.nearness * self.distances
        only_before = before - similarity.softmax(-1) @ after
        only_after = after - similarity.transpose(1, 2).softmax(-1) @ before
        return only_before.transpose(1, 2).reshape(shape), only_after.transpose(1, 2).reshape(shape)


class SiameseCNN(nn.Module):
    def __init__(self, architecture: Architecture, num_words: int) -> None:
        super().__init__()
        self.architecture = architecture
        low, middle, high = architecture.channels
        width, side = architecture.width, architecture.image_px // STRIDE
        self.tower = nn.Sequential(convolution(3, low, 5, 2), nn.ReLU(), Block(low, middle, 2), Block(middle, high, 2),
                                   Block(high, high, 1))
        matched = architecture.comparison == "matched"
        self.match = FeatureMatch(side, high) if matched else None
        self.join = nn.Sequential(convolution((5 if matched else 3) * high, width, 1, 1), nn.ReLU(),
                                  Block(width, width, 2))
        self.places = nn.Parameter(0.02 * torch.randn((side // 2) ** 2, width))
        self.words = nn.Embedding(num_words, width, padding_idx=PAD)
        self.turns = nn.Parameter(0.02 * torch.randn(architecture.max_words + 1, width))
        layer = nn.TransformerDecoderLayer(width, architecture.heads, 4 * width, dropout=0.1, activation="gelu",
                                           batch_first=True, norm_first=True)
        self.decoder = nn.TransformerDecoder(layer, architecture.layers, nn.LayerNorm(width))
        nn.init.normal_(self.words.weight, std=0.02)

    def forward(self, images: Tensor, words: Tensor) -> Tensor:
        """Return logits (B pairs, T, vocabulary size) of the word that follows each of the T words of a caption.

        `images` are pixel values (B, 2, 3, height, width), and `words` are word ids (B, T).
        """
        return self.word_logits(self.encode(images), words)

    def encode(self, images: Tensor) -> Tensor:
        """Return the features that the decoder attends to, (B pairs, positions, channels).

        `images` has shape (B pairs, 2, 3, height, width), with pixel values from 0 to 255.
        """
        pixels = images.flatten(0, 1).float() / 127.5 - 1
        # Both images go through one call, so that batch normalization uses the same statistics for both.
        features = self.tower(pixels.contiguous(memory_format=torch.channels_last))
        before, after = features.unflatten(0, (-1, 2)).unbind(1)  # (B, C, S, S)
        views = [before, after, after - before, *(self.match(before, after) if self.match else ())]
        return self.join(torch.cat(views, 1)).flatten(2).transpose(1, 2) + self.places

    def word_logits(self, context: Tensor, words: Tensor) -> Tensor:
        """Return logits (B pairs, T, vocabulary size) of the word that follows each of the T words of a caption.

        `context` are the features that `encode` returned, and `words` are word ids (B, T).
        """
        num = words.shape[1]
        hidden = self.words(words) + self.turns[:num]
        later = torch.ones(num, num, dtype=torch.bool, device=words.device).triu(1)
        return self.decoder(hidden, context, tgt_mask=later, tgt_is_causal=True) @ self.words.weight.T


class SiameseCaptioner:
    """A trained Siamese CNN with its vocabulary, which writes captions for pairs of images."""

    def __init__(self, model: SiameseCNN, vocabulary: Vocabulary) -> None:
        self.model, self.vocabulary = model, vocabulary

    @torch.inference_mode()
    def caption(self, pairs: Sequence[tuple[Image.Image, Image.Image]]) -> list[str]:
        """Return a caption for each pair (before, after), with greedy decoding."""
        side = self.model.architecture.image_px
        images = [torch.stack([pixels(image, side) for image in pair]) for pair in pairs]
        return self.caption_pixels(torch.stack(images))

    @torch.inference_mode()
    def caption_pixels(self, images: Tensor) -> list[str]:
        """Return a caption for each pair, with greedy decoding.

        `images` has shape (B pairs, 2, 3, height, width), with pixel values from 0 to 255.
        """
        self.model.eval()
        device = self.model.places.device
        context = self.model.encode(images.to(device))
        ids = torch.full((len(images), 1), BEGIN, device=device)
        for _ in range(self.model.architecture.max_words):
            ids = torch.cat([ids, self.model.word_logits(context, ids)[:, -1:].argmax(-1)], 1)
            if (ids == END).any(1).all():
                break
        return self.vocabulary.decode(ids[:, 1:])

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in self.model.state_dict().items()}, folder / WEIGHTS)
        write_json(folder / SETTINGS, {"architecture": asdict(self.model.architecture),
                                       "words": self.vocabulary.words[len(MARKS):]}, indent=1)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Load a captioner from a folder that `save` wrote.

        Raises FileNotFoundError if a file is missing, ValueError if the weights do not fit the settings file.
        """
        for name in (SETTINGS, WEIGHTS):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} must contain a Siamese CNN, but {name} does not exist; "
                                        "'python -m benchmarks.baselines' trains one")
        settings = read_json(folder / SETTINGS)
        channels = tuple(settings["architecture"]["channels"])
        vocabulary = Vocabulary(settings["words"])
        model = SiameseCNN(Architecture(**settings["architecture"] | {"channels": channels}), len(vocabulary.words))
        try:
            model.load_state_dict(load_file(folder / WEIGHTS))
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(f"{folder / WEIGHTS}: must contain weights that fit {SETTINGS} in the same folder, but "
                             f"could not be loaded ({' '.join(str(error).split())[:200]}); train the CNN again"
                             ) from None
        return cls(model.eval(), vocabulary)


def pixels(image: Image.Image, image_px: int) -> Tensor:
    """Resize an image to a square, and return pixel values from 0 to 255 as a tensor (3, image_px, image_px)."""
    if image.size != (image_px, image_px):
        image = image.resize((image_px, image_px), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)

