"""OneDiffProcessor: turns images and prompts into the tensors that the model takes.

Shapes:  B rows, M images in the batch, S sequence length.
"""

from __future__ import annotations

import math
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer, BatchFeature, ProcessorMixin

from onediff.inputs.prompt import (
    DEFAULT_INSTRUCTION,
    DELTA,
    DELTA_MARK,
    IMAGE,
    IMAGE_MARK,
    Prompt,
    expand,
    pair_prompt,
)
from onediff.inputs.tokenization import TextTokenizer

IGNORED = -100  # label of tokens that do not count in the loss; this value is the default of PyTorch's cross_entropy
FILTER_PX = 4  # the resampling filters of Pillow read at most 3 pixels on each side; 4 because of fractions of a pixel
Number = TypeVar("Number", int, float)


class OneDiffProcessor(ProcessorMixin):
    """A transformers processor that prepares images and prompts for OneDiff, for training and for inference.

    Every image is padded to a square with the mean colour, resized and normalized. Images are never flipped or cropped.
    """

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, tokens_per_image: int = 1,
                 delta_tokens: int = 1, images_joined: bool = False, template: str = "plain", max_length: int = 2048,
                 **kwargs: Any) -> None:
        # The model replaces these placeholder tokens by visual tokens, so they need no rows in the embedding table.
        tokenizer.add_special_tokens({"extra_special_tokens": [IMAGE, DELTA]})
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
        self.tokens_per_image, self.delta_tokens, self.images_joined = tokens_per_image, delta_tokens, images_joined
        self.template, self.max_length = template, max_length
        self._texts = TextTokenizer(tokenizer, {IMAGE: IMAGE_MARK, DELTA: DELTA_MARK})
        super().__init__(image_processor, tokenizer, **kwargs)

    @classmethod
    def from_pretrained(cls, folder: Any, **kwargs: Any) -> OneDiffProcessor:
        """Load a processor from a folder that `save_pretrained` wrote.

        The image processor uses Pillow, so that torchvision is not needed.
        """
        settings = cls.get_processor_dict(folder)[0]
        keys = {"tokens_per_image", "delta_tokens", "images_joined", "template", "max_length"} & {*settings}
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        return cls(load_image_processor(folder), tokenizer, **{key: settings[key] for key in keys}, **kwargs)

    @property
    def image_token_id(self) -> int:
        return self.tokenizer.convert_tokens_to_ids(IMAGE)

    @property
    def delta_token_id(self) -> int:
        return self.tokenizer.convert_tokens_to_ids(DELTA)

    def __call__(self, pairs: list[tuple[Image.Image, Image.Image]],
                 instructions: list[str] | None = None) -> BatchFeature:
        """Return the inputs with which the model captions pairs of images.

        These are images (2B, 3, height, width) and image_counts (B,) for B pairs, and input_ids and attention_mask
        (B, S tokens), padded on the left. `instructions` has one instruction for each pair; without it, all pairs get
        the default instruction.
        """
        questions = instructions or [DEFAULT_INSTRUCTION] * len(pairs)
        prompts = [pair_prompt(self.template, question) for _, question in zip(pairs, questions, strict=True)]
        return BatchFeature(self.questions(prompts)
                            | {"images": self.pixels([image for pair in pairs for image in pair])})

    def pixels(self, images: list[Image.Image]) -> Tensor:
        """Pad, resize and normalize images of any size, and return a tensor (M images, 3, height, width).

        The result equals that of the image processor of transformers, but is computed faster.
        """
        return self.normalized(self.squares(images))

    def squares(self, images: list[Image.Image]) -> NDArray[np.uint8]:
        """Pad images of any size to squares and resize them, (M images, height, width, 3)."""
        side, settings = self.image_px, self.image_processor
        # LLaVA rounds the mean colour down, too: (122, 116, 104) for CLIP.
        color = tuple(int(value / settings.rescale_factor) for value in settings.image_mean)
        batch = np.empty((len(images), side, side, 3), dtype=np.uint8)
        for image, pixels in zip(images, batch, strict=True):
            pixels[:] = np.asarray(_squared(image, side, settings.resample, color=color))
        return batch

    def normalized(self, squares: NDArray[np.uint8]) -> Tensor:
        """Normalize the result of `squares`, and return a tensor (M images, 3, height, width)."""
        settings = self.image_processor
        mean, std = (np.array(values, dtype=np.float64) for values in (settings.image_mean, settings.image_std))
        scale, shift = (settings.rescale_factor / std).astype(np.float32), (mean / std).astype(np.float32)
        batch = np.empty((len(squares), 3, *squares.shape[1:3]), dtype=np.float32)
        for square, pixels in zip(squares, batch, strict=True):
            for channel in range(3):
                np.multiply(square[..., channel], scale[channel], out=pixels[channel])
                pixels[channel] -= shift[channel]
        return torch.from_numpy(batch)

    @property
    def image_px(self) -> int:
        """Width and height, in pixels, of the images that the vision tower takes.

        If the image processor has a crop size, as CLIP's has, this is the crop size. The images are resized and not
        cropped, because a crop could cut off a change.
        """
        settings = self.image_processor
        size = settings.crop_size if getattr(settings, "do_center_crop", False) else settings.size
        return int(size["height"] if size.get("height") else size["shortest_edge"])

    def questions(self, prompts: list[Prompt]) -> dict[str, Tensor]:
        """Tokenize prompts for generation: only the questions, padded on the left."""
        rows = [self.encode_question(prompt) for prompt in prompts]
        longest = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        return {"input_ids": torch.tensor([[pad] * (longest - len(row)) + row for row in rows]),
                "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]),
                "image_counts": torch.tensor([prompt.num_images for prompt in prompts])}

    def answers(self, prompts: list[Prompt]) -> dict[str, Tensor]:
        """Tokenize prompts for training: questions and answers, padded on the right.

        Only the tokens of the answers and their end-of-sequence tokens have labels.
        """
        rows = [self.encode_turns(prompt) for prompt in prompts]
        longest = max(len(ids) for ids, _ in rows)
        pad = self.tokenizer.pad_token_id
        return {"input_ids": torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in rows]),
                "attention_mask": torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in rows]),
                "labels": torch.tensor([labels + [IGNORED] * (longest - len(labels)) for _, labels in rows]),
                "image_counts": torch.tensor([prompt.num_images for prompt in prompts])}

    def encode_turns(self, prompt: Prompt) -> tuple[list[int], list[int]]:
        """Return the token ids and labels of all questions and answers of a prompt, at most `max_length` of each."""
        question = self.encode_question(prompt)
        answer = self.encode_answer(prompt.answer)
        ids, labels = question + answer, [IGNORED] * len(question) + answer
        for text, reply in prompt.later:
            question = self._texts.encode(text)
            answer = self.encode_answer(reply)
            ids, labels = ids + question + answer, labels + [IGNORED] * len(question) + answer
        return ids[: self.max_length], labels[: self.max_length]

    def encode_question(self, prompt: Prompt) -> list[int]:
        """Tokenize the question of a prompt, with placeholders for the visual tokens.

        Raises ValueError if the question is too long for max_length, because truncation would remove placeholders.
        """
        text = expand(prompt.question, tokens_per_image=self.tokens_per_image, delta_tokens=self.delta_tokens,
                      joined=self.images_joined)
        ids = [self.tokenizer.bos_token_id] if self.tokenizer.bos_token_id is not None else []
        ids += self._texts.encode(text)
        if len(ids) >= self.max_length:
            raise ValueError(f"params.yaml: model.max_length {self.max_length} is too short for a question of "
                             f"{len(ids)} tokens; increase model.max_length")
        return ids

    def encode_answer(self, answer: str | None) -> list[int]:
        """Tokenize an answer and append the end-of-sequence token."""
        return [*self._texts.encode((answer or "").strip()), self.tokenizer.eos_token_id]


def _squared(image: Image.Image, side: int, resample: int, *, color: tuple[int, ...]) -> Image.Image:
    """Pad an image to a centred square with `color`, and resize the square to `side` pixels, as LLaVA does.

    Of the padding, only the margin that the resampling filter mixes with the image is resized, because the square of a
    long image would need much memory.
    """
    longest, shortest, is_wide = max(image.size), min(image.size), image.width > image.height
    if longest == shortest:
        return image.resize((side, side), Image.Resampling(resample))
    # Rows are counted along the shorter side of the image, so they are columns of a high image.
    scale, offset = longest / side, (longest - shortest) // 2  # `offset`: rows of the square before the image
    margin = math.ceil(FILTER_PX * max(1, 1 / scale))
    first = max(0, math.floor(offset / scale) - margin)
    last = min(side, math.ceil((offset + shortest) / scale) + margin)
    # The result has these rows of the image; they begin and end in the padding, so the image gets some rows of it.
    start, end = first * scale - offset, last * scale - offset
    before = min(offset, math.ceil(max(-start, 0)) + FILTER_PX)
    after = min(longest - shortest - offset, math.ceil(max(end - shortest, 0)) + FILTER_PX)
    padded = Image.new("RGB", _ordered(longest, before + shortest + after, is_wide), color)
    padded.paste(image, _ordered(0, before, is_wide))
    left, top = _ordered(0, before + start, is_wide)
    right, bottom = _ordered(longest, min(before + end, padded.size[is_wide]), is_wide)
    width, height = _ordered(side, last - first, is_wide)
    # Width before height, as for a square: Pillow begins with the height of a narrow image, and rounds in between.
    part = padded.resize((width, padded.height), Image.Resampling(resample), box=(left, 0, right, padded.height))
    part = part.resize((width, height), Image.Resampling(resample), box=(0, top, width, bottom))
    square = Image.new("RGB", (side, side), color)
    square.paste(part, _ordered(0, first, is_wide))
    return square


def _ordered(along: Number, across: Number, is_wide: bool) -> tuple[Number, Number]:
    """Return x and y of a point, from its coordinates along and across the longer side of an image."""
    return (along, across) if is_wide else (across, along)


def load_image_processor(folder: Any) -> Any:
    return AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
