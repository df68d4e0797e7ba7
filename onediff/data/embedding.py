"""Images and texts as unit vectors of a CLIP-class model: near in meaning, near in angle."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from onediff.config import Runtime
from onediff.data.collection import Entry, load
from onediff.data.parallel import spread
from onediff.inputs.images import open_image

Vectors = NDArray[np.float32]
BATCH = 64
PART = 512  # images whose vectors are kept together: what a kill can cost


class Embedder:
    """CLIP, SigLIP or any of their class, by folder or name; half precision on a GPU."""

    def __init__(self, model: str, device: str = "auto") -> None:
        """Raises OSError (transformers' own) if there is no such model."""
        import torch
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

        cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
        self.model = AutoModel.from_pretrained(model, dtype=torch.float16 if cuda else torch.float32).eval()
        self.model.to("cuda" if cuda else "cpu")
        self.processor = AutoImageProcessor.from_pretrained(model, backend="pil")
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self._longest = self.model.config.text_config.max_position_embeddings
        self._padding = "max_length" if self.model.config.model_type.startswith("siglip") else True

    def images(self, images: list[Image.Image]) -> Vectors:
        """RGB images of any size -> (n, d), each row of length 1."""
        return self._batched(images, lambda part: self.model.get_image_features(
            self.processor(part, return_tensors="pt")["pixel_values"].to(self.model.device, self.model.dtype)))

    def texts(self, texts: list[str]) -> Vectors:
        """-> (n, d), each row of length 1; what is longer than the model reads is cut."""
        return self._batched(texts, lambda part: self.model.get_text_features(**self.tokenizer(
            part, padding=self._padding, truncation=True, max_length=self._longest,
            return_tensors="pt").to(self.model.device)))

    @property
    def identity(self) -> str:
        """Differs when the weights differ."""
        return f"{float(sum(p.detach().double().abs().sum() for p in self.model.parameters())):.12g}"

    def _batched(self, items: list[Any], features: Callable[[list[Any]], Any]) -> Vectors:
        import torch

        rows = []
        with torch.inference_mode():
            for start in range(0, len(items), BATCH):
                found = features(items[start : start + BATCH])
                found = getattr(found, "pooler_output", found).float()  # older transformers give the tensor itself
                rows.append(torch.nn.functional.normalize(found, dim=-1).cpu().numpy())
        return np.concatenate(rows)


@dataclass(frozen=True)
class Embedded:
    """Vectors of the images that can be read, in order, and why the others cannot."""

    vectors: Vectors
    names: list[str]
    broken: dict[str, str]


def embed_collection(entries: list[Entry], model: str, runtime: Runtime, *,
                     max_megapixels: float) -> Iterator[Embedded]:
    """PART images at a time, in order. Kept in scratch by content, so that a stopped run costs one part."""
    parts = [entries[start : start + PART] for start in range(0, len(entries), PART)]
    folder = Path(runtime.scratch) / "embeddings"
    return spread(_Maker(model, runtime.device, folder, max_megapixels), parts, runtime, num_gpus=1)


@dataclass(frozen=True)
class _Maker:
    model: str
    device: str
    folder: Path
    max_megapixels: float

    def __call__(self) -> Callable[[list[Entry]], Embedded]:
        embedder = Embedder(self.model, self.device)
        known = embedder.identity
        return lambda part: self._embed(embedder, known, part)

    def _embed(self, embedder: Embedder, known: str, part: list[Entry]) -> Embedded:
        images, names, broken = [], [], {}
        key = hashlib.sha256(known.encode())
        for item in load(part):
            try:
                images.append(open_image(item.content, max_megapixels=self.max_megapixels))
                names.append(item.name)
                key.update(hashlib.sha256(item.content).digest())
            except ValueError as error:
                broken[item.name] = str(error)
        if not images:
            return Embedded(np.zeros((0, 0), np.float32), [], broken)
        path = self.folder / f"{key.hexdigest()[:32]}.npy"
        if not path.exists():
            _write(path, embedder.images(images))
        return Embedded(np.load(path), names, broken)


def _write(path: Path, vectors: Vectors) -> None:
    """Appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_suffix(f".{os.getpid()}.part")
    with half.open("wb") as file:
        np.save(file, vectors)
    half.rename(path)
