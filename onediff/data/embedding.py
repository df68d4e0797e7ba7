"""Embeds images and texts as unit vectors with a CLIP-class model, so that their cosine measures similarity."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from onediff.inputs.prompt import plain
from onediff.inputs.tokenization import TextTokenizer

Vectors = NDArray[np.float32]
BATCH = 64


class Embedder:
    """A CLIP, SigLIP or similar model that embeds images and texts; it runs in half precision on a GPU."""

    def __init__(self, model: str, device: str = "auto") -> None:
        """Load the model and its processors from a local folder, or from the Hugging Face Hub by name.

        Raises OSError (from transformers) if the model does not exist.
        """
        import torch
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

        cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
        loaded = AutoModel.from_pretrained(model, dtype=torch.float16 if cuda else torch.float32)
        self.model = loaded.eval().to("cuda" if cuda else "cpu")
        self.processor = AutoImageProcessor.from_pretrained(model, backend="pil")
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self._longest = self.model.config.text_config.max_position_embeddings
        is_siglip = self.model.config.model_type.startswith("siglip")
        self._padding = {"padding": "max_length", "max_length": self._longest} if is_siglip else {"padding": True}

    def images(self, images: list[Image.Image]) -> Vectors:
        """Return one embedding per RGB image, as an array (images, dimensions); each embedding has length 1."""
        return self._batched(images, lambda part: self.model.get_image_features(
            self.processor(part, return_tensors="pt")["pixel_values"].to(self.model.device, self.model.dtype)))

    def texts(self, texts: list[str]) -> Vectors:
        """Return one embedding per text, as an array (texts, dimensions); each embedding has length 1.

        Texts that are too long for the model are truncated. Control tokens in a text, such as "<|endoftext|>", are
        only letters. Raises ValueError if the model does not have a fast tokenizer.
        """
        tokenizer, backend = TextTokenizer(self.tokenizer, {}), self.tokenizer.backend_tokenizer
        backend.no_padding()
        backend.enable_truncation(self._longest)
        rows = [backend.post_process(tokenizer.encoding(plain(text))).ids for text in texts]
        return self._batched(rows, lambda part: self.model.get_text_features(**self.tokenizer.pad(
            {"input_ids": part}, **self._padding, return_tensors="pt").to(self.model.device)))

    @property
    def identity(self) -> str:
        """Return a text that changes whenever the model's weights, dtype or image preprocessing change."""
        weights = float(sum(p.detach().double().abs().sum() for p in self.model.parameters()))
        return f"{weights:.12g} {self.model.dtype} {self.processor.to_json_string()}"

    def _batched(self, items: list[Any], features: Callable[[list[Any]], Any]) -> Vectors:
        import torch

        rows = []
        with torch.inference_mode():
            for start in range(0, len(items), BATCH):
                output = features(items[start : start + BATCH])
                # Older versions of transformers return the embeddings as a tensor instead of an output object.
                vectors = getattr(output, "pooler_output", output).float()
                rows.append(torch.nn.functional.normalize(vectors, dim=-1).cpu().numpy())
        return np.concatenate(rows)
