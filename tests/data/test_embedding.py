from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_diffusion import save_clip
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from onediff.data import embedding
from onediff.data.embedding import Embedder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_clip(tmp_path_factory.mktemp("clip"))


def picture(seed: int, width: int = 40, height: int = 50) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_image_vectors_equal_the_normalized_embeddings_of_the_clip_model(clip: str) -> None:
    images = [picture(k, 30 + k) for k in range(3)]
    model, processor = CLIPModel.from_pretrained(clip).eval(), CLIPImageProcessorPil.from_pretrained(clip)
    with torch.no_grad():
        features = model.vision_model(**processor(images, return_tensors="pt")).pooler_output
        expected = torch.nn.functional.normalize(model.visual_projection(features), dim=-1)
    assert Embedder(clip, "cpu").images(images) == pytest.approx(expected.numpy(), abs=1e-6)


def test_text_vectors_have_length_one_and_differ_between_texts(clip: str) -> None:
    vectors = Embedder(clip, "cpu").texts(["a red car", "a dog", "word " * 300])
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1)
    assert vectors[0] @ vectors[1] < 0.9999


def test_text_vectors_equal_the_normalized_embeddings_of_the_clip_model(clip: str) -> None:
    texts = ["a red car", "A  dog's\nhouse!", "", "word " * 300]
    model, tokenizer = CLIPModel.from_pretrained(clip).eval(), CLIPTokenizer.from_pretrained(clip)
    longest = model.config.text_config.max_position_embeddings
    for text, vector in zip(texts, Embedder(clip, "cpu").texts(texts), strict=True):
        with torch.no_grad():
            inputs = tokenizer(text, truncation=True, max_length=longest, return_tensors="pt")
            expected = torch.nn.functional.normalize(
                model.text_projection(model.text_model(**inputs).pooler_output), dim=-1)
        assert vector == pytest.approx(expected[0].numpy(), abs=1e-6)


def test_a_control_token_in_a_text_is_only_letters(clip: str) -> None:
    """CLIP takes the embedding at the first end token, so the words after it would not count."""
    red, blue = Embedder(clip, "cpu").texts(["a <|endoftext|> red", "a <|endoftext|> blue"])
    assert red @ blue < 0.9999


def test_image_vectors_do_not_depend_on_the_batch_size(clip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    embedder, images = Embedder(clip, "cpu"), [picture(k) for k in range(7)]
    expected = embedder.images(images)
    monkeypatch.setattr(embedding, "BATCH", 3)
    assert embedder.images(images) == pytest.approx(expected, abs=1e-6)


def test_a_model_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        Embedder(str(tmp_path / "nowhere"), "cpu")
