from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_diffusion import save_clip
from transformers import CLIPImageProcessorPil, CLIPModel

from onediff.config import Runtime
from onediff.data import embedding
from onediff.data.collection import Entry, list_collection
from onediff.data.embedding import Embedder, embed_collection


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_clip(tmp_path_factory.mktemp("clip"))


def picture(seed: int, width: int = 40, height: int = 50) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_vectors_equal_those_of_the_model_itself(clip: str) -> None:
    images = [picture(k, 30 + k) for k in range(3)]
    model, processor = CLIPModel.from_pretrained(clip).eval(), CLIPImageProcessorPil.from_pretrained(clip)
    with torch.no_grad():
        seen = model.vision_model(**processor(images, return_tensors="pt")).pooler_output
        expected = torch.nn.functional.normalize(model.visual_projection(seen), dim=-1)
    assert Embedder(clip, "cpu").images(images) == pytest.approx(expected.numpy(), abs=1e-6)


def test_texts_of_any_length_have_length_one_and_their_own_direction(clip: str) -> None:
    vectors = Embedder(clip, "cpu").texts(["a red car", "a dog", "word " * 300])
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1)
    assert vectors[0] @ vectors[1] < 0.9999


def test_batches_change_nothing(clip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    embedder, images = Embedder(clip, "cpu"), [picture(k) for k in range(7)]
    whole = embedder.images(images)
    monkeypatch.setattr(embedding, "BATCH", 3)
    assert embedder.images(images) == pytest.approx(whole, abs=1e-6)


@pytest.fixture
def collection(tmp_path: Path) -> list[Entry]:
    folder = tmp_path / "images"
    folder.mkdir()
    for k in range(11):
        picture(k).save(folder / f"{k:02d}.png")
    (folder / "04.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    rows = "".join(f"{k:02d}.png,number {k}\n" for k in range(11))
    (folder / "captions.csv").write_text("image,caption\n" + rows)
    return list_collection(folder)


def test_a_collection_is_embedded_in_order_and_what_is_broken_is_named(
        clip: str, collection: list[Entry], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "PART", 3)
    runtime = Runtime(workers=2, scratch=str(tmp_path / "scratch"), device="cpu")
    parts = list(embed_collection(collection, clip, runtime, max_megapixels=1))
    assert [name for part in parts for name in part.names] == [f"{k:02d}.png" for k in range(11) if k != 4]
    assert list({name: why for part in parts for name, why in part.broken.items()}) == ["04.png"]
    whole = Embedder(clip, "cpu").images([picture(k) for k in range(11) if k != 4])
    assert np.concatenate([part.vectors for part in parts]) == pytest.approx(whole, abs=1e-6)
    assert len(list((tmp_path / "scratch").rglob("*.npy"))) == 4


def test_what_was_embedded_is_not_embedded_again(clip: str, collection: list[Entry], tmp_path: Path) -> None:
    runtime = Runtime(workers=1, scratch=str(tmp_path / "scratch"), device="cpu")
    [first] = embed_collection(collection, clip, runtime, max_megapixels=1)
    [kept] = (tmp_path / "scratch").rglob("*.npy")
    np.save(kept, first.vectors + 1)
    [again] = embed_collection(collection, clip, runtime, max_megapixels=1)
    assert np.array_equal(again.vectors, first.vectors + 1)
    file = io.BytesIO()
    picture(99).save(file, "PNG")
    collection[0].path.write_bytes(file.getvalue())  # other content: another key
    [changed] = embed_collection(collection, clip, runtime, max_megapixels=1)
    assert not np.allclose(changed.vectors, first.vectors + 1)


def test_a_model_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        Embedder(str(tmp_path / "nowhere"), "cpu")
