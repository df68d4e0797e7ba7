from __future__ import annotations

import io
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_diffusion import save_clip

from onediff.config import Retrieval, Runtime
from onediff.data.embedding import Embedder
from onediff.data.sources import retrieval
from onediff.data.sources.collection import Entry, list_collection
from onediff.data.sources.retrieval import SimilarPair, embed_collection, find_pairs

SETTINGS = Retrieval(min_similarity=0.5, max_similarity=0.9, max_uses=3, num_neighbors=60)


def unit(count: int, width: int = 7, seed: int = 0) -> tuple[np.ndarray, list[str]]:
    vectors = np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True), [f"{k}.jpg" for k in range(count)]


def by_brute_force(vectors: np.ndarray, settings: Retrieval) -> list[tuple[int, int]]:
    cosines = vectors @ vectors.T
    inside = [(-round(float(cosines[i, j]), 6), i, j) for i in range(len(vectors)) for j in range(i + 1, len(vectors))
              if settings.min_similarity <= cosines[i, j] <= settings.max_similarity]
    uses, pairs = Counter[int](), []
    for _, i, j in sorted(inside):
        if uses[i] < settings.max_uses and uses[j] < settings.max_uses:
            uses.update((i, j))
            pairs.append((i, j))
    return pairs


def places(pairs: list[SimilarPair]) -> list[tuple[int, int]]:
    return [(min(pair.before, pair.after), max(pair.before, pair.after)) for pair in pairs]


def test_pairs_equal_those_of_a_search_through_all() -> None:
    vectors, names = unit(61)
    pairs = find_pairs(vectors, names, SETTINGS)
    assert len(pairs) > 40
    assert places(pairs) == by_brute_force(vectors, SETTINGS)


def test_near_duplicates_and_unrelated_images_stay_out_and_no_image_is_used_too_often() -> None:
    vectors, names = unit(61)
    vectors[1], vectors[2] = vectors[0], -vectors[0]
    settings = SETTINGS.model_copy(update={"max_uses": 1})
    pairs = find_pairs(vectors, names, settings)
    assert (0, 1) not in places(pairs) and (0, 2) not in places(pairs)
    assert max(Counter(place for pair in places(pairs) for place in pair).values()) == 1
    assert all(0.5 <= pair.similarity <= 0.9 for pair in pairs)


def test_either_image_may_come_first() -> None:
    pairs = find_pairs(*unit(61), SETTINGS)
    assert 0.3 < np.mean([pair.before < pair.after for pair in pairs]) < 0.7


def test_an_inverted_file_finds_nearly_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, names = unit(2000, seed=3)
    settings = SETTINGS.model_copy(update={"num_neighbors": 8, "min_similarity": 0.6})
    exact = set(places(find_pairs(vectors, names, settings)))
    monkeypatch.setattr(retrieval, "EXACT_UP_TO", 100)
    pairs = set(places(find_pairs(vectors, names, settings)))
    assert len(exact & pairs) > 0.9 * len(exact)
    assert pairs == set(places(find_pairs(vectors, names, settings)))


def test_fewer_images_than_neighbours_are_no_trouble() -> None:
    vectors, names = unit(3)
    assert places(find_pairs(vectors, names, SETTINGS)) == by_brute_force(vectors, SETTINGS)
    assert find_pairs(vectors[:1], names[:1], SETTINGS) == []


# --- vectors ---


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_clip(tmp_path_factory.mktemp("clip"))


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (50, 40, 3), dtype=np.uint8))


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
    monkeypatch.setattr(retrieval, "PART", 3)
    runtime = Runtime(workers=2, scratch=str(tmp_path / "scratch"), device="cpu")
    parts = list(embed_collection(collection, clip, runtime, max_megapixels=1))
    assert [name for part in parts for name in part.names] == [f"{k:02d}.png" for k in range(11) if k != 4]
    assert list({name: why for part in parts for name, why in part.unreadable.items()}) == ["04.png"]
    whole = Embedder(clip, "cpu").images([picture(k) for k in range(11) if k != 4])
    assert np.concatenate([part.vectors for part in parts]) == pytest.approx(whole, abs=1e-6)
    assert len(list((tmp_path / "scratch").rglob("*.npy"))) == 4


def test_what_was_embedded_is_not_embedded_again(clip: str, collection: list[Entry], tmp_path: Path) -> None:
    runtime = Runtime(workers=1, scratch=str(tmp_path / "scratch"), device="cpu")
    [first] = embed_collection(collection, clip, runtime, max_megapixels=1)
    [stored] = (tmp_path / "scratch").rglob("*.npy")
    np.save(stored, first.vectors + 1)
    [again] = embed_collection(collection, clip, runtime, max_megapixels=1)
    assert np.array_equal(again.vectors, first.vectors + 1)
    file = io.BytesIO()
    picture(99).save(file, "PNG")
    collection[0].path.write_bytes(file.getvalue())  # other content: another key
    [changed] = embed_collection(collection, clip, runtime, max_megapixels=1)
    assert not np.allclose(changed.vectors, first.vectors + 1)
