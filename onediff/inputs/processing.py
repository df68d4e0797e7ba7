"""OneDiffProcessor: images and prompts in, a batch out.

Shapes:  B rows, M images in the batch, S sequence length.
"""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer, BatchFeature, ProcessorMixin

from onediff.inputs.prompt import DEFAULT_INSTRUCTION, DELTA, IMAGE, Prompt, expand, pair_prompt

IGNORED = -100


class OneDiffProcessor(ProcessorMixin):
    """One transform for every image, one format for every prompt.

    An image is padded to a square with the mean colour, resized and normed; never flipped.
    """

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, tokens_per_image: int = 1,
                 delta_tokens: int = 1, template: str = "plain", max_length: int = 2048, **kwargs: Any) -> None:
        # Placeholders: never looked up in the embedding.
        tokenizer.add_special_tokens({"extra_special_tokens": [IMAGE, DELTA]})
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
        self.tokens_per_image, self.delta_tokens = tokens_per_image, delta_tokens
        self.template, self.max_length = template, max_length
        super().__init__(image_processor, tokenizer, **kwargs)

    @classmethod
    def from_pretrained(cls, folder: Any, **kwargs: Any) -> OneDiffProcessor:
        """A folder that `save_pretrained` wrote; the image processor on Pillow, so no torchvision is needed."""
        settings = cls.get_processor_dict(folder)[0]
        keep = {key: settings[key] for key in ("tokens_per_image", "delta_tokens", "template", "max_length")}
        return cls(load_image_processor(folder), AutoTokenizer.from_pretrained(folder), **keep, **kwargs)

    @property
    def image_token_id(self) -> int:
        return self.tokenizer.convert_tokens_to_ids(IMAGE)

    @property
    def delta_token_id(self) -> int:
        return self.tokenizer.convert_tokens_to_ids(DELTA)

    def __call__(self, pairs: list[tuple[Image.Image, Image.Image]],
                 instructions: list[str] | None = None) -> BatchFeature:
        """Pairs to caption -> images (2B, 3, H, W), image_counts (B,), input_ids and attention_mask (B, S).

        One instruction per pair, or the default for all; rows are padded on the left.
        """
        asked = instructions or [DEFAULT_INSTRUCTION] * len(pairs)
        prompts = [pair_prompt(self.template, instruction) for _, instruction in zip(pairs, asked, strict=True)]
        return BatchFeature(self.questions(prompts)
                            | {"images": self.pixels([image for pair in pairs for image in pair])})

    def pixels(self, images: list[Image.Image]) -> Tensor:
        """Images of any size -> (M, 3, H, W)."""
        mean = tuple(round(255 * value) for value in self.image_processor.image_mean)
        squares = [image if image.width == image.height else
                   ImageOps.pad(image, (max(image.size),) * 2, color=mean) for image in images]
        return self.image_processor(squares, return_tensors="pt")["pixel_values"]

    def questions(self, prompts: list[Prompt]) -> dict[str, Tensor]:
        """For generation: questions alone, padded on the left."""
        rows = [self.encode_question(prompt) for prompt in prompts]
        longest = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        return {"input_ids": torch.tensor([[pad] * (longest - len(row)) + row for row in rows]),
                "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]),
                "image_counts": torch.tensor([prompt.num_images for prompt in prompts])}

    def answers(self, prompts: list[Prompt]) -> dict[str, Tensor]:
        """For training: question and answer, padded on the right, labels on the answer and its end alone."""
        questions = [self.encode_question(prompt) for prompt in prompts]
        answers = [self.encode_answer(prompt, room=self.max_length - len(q))
                   for prompt, q in zip(prompts, questions, strict=True)]
        longest = max(len(q) + len(a) for q, a in zip(questions, answers, strict=True))
        ids, mask, labels = [], [], []
        for question, answer in zip(questions, answers, strict=True):
            rest = longest - len(question) - len(answer)
            ids.append(question + answer + [self.tokenizer.pad_token_id] * rest)
            mask.append([1] * (longest - rest) + [0] * rest)
            labels.append([IGNORED] * len(question) + answer + [IGNORED] * rest)
        return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask), "labels": torch.tensor(labels),
                "image_counts": torch.tensor([prompt.num_images for prompt in prompts])}

    def encode_question(self, prompt: Prompt) -> list[int]:
        """Raises ValueError if the question alone is longer than max_length: cutting it would cut placeholders."""
        text = expand(prompt.question, tokens_per_image=self.tokens_per_image, delta_tokens=self.delta_tokens)
        ids = [self.tokenizer.bos_token_id] if self.tokenizer.bos_token_id is not None else []
        ids += self.tokenizer.encode(text, add_special_tokens=False)
        if len(ids) >= self.max_length:
            raise ValueError(f"params.yaml: model.max_length {self.max_length} is too short for a question of "
                             f"{len(ids)} tokens; raise it")
        return ids

    def encode_answer(self, prompt: Prompt, *, room: int) -> list[int]:
        return [*self.tokenizer.encode(" ".join((prompt.answer or "").split()), add_special_tokens=False),
                self.tokenizer.eos_token_id][:room]


def load_image_processor(folder: Any) -> Any:
    return AutoImageProcessor.from_pretrained(folder, backend="pil")
