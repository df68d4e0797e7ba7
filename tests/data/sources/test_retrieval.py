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


def unit_vectors(count: int, width: int = 7, seed: int = 0) -> tuple[np.ndarray, list[str]]:
    """Return random vectors (count, width) of length 1, and a file name for each vector."""
    vectors = np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True), [f"{k}.jpg" for k in range(count)]


def by_brute_force(vectors: np.ndarray, settings: Retrieval) -> list[tuple[int, int]]:
    """Return the pairs of indices in the order of their similarity, by comparing each vector with all others."""
    cosines = vectors @ vectors.T
    similar = [(-round(float(cosines[i, j]), 6), i, j) for i in range(len(vectors)) for j in range(i + 1, len(vectors))
               if settings.min_similarity <= cosines[i, j] <= settings.max_similarity]
    uses, pairs = Counter[int](), []
    for _, i, j in sorted(similar):
        if uses[i] < settings.max_uses and uses[j] < settings.max_uses:
            uses.update((i, j))
            pairs.append((i, j))
    return pairs


def indices(pairs: list[SimilarPair]) -> list[tuple[int, int]]:
    """Return the indices of the two images of each pair, the smaller index first."""
    return [(min(pair.before, pair.after), max(pair.before, pair.after)) for pair in pairs]


def test_pairs_equal_the_pairs_of_an_exhaustive_search() -> None:
    vectors, names = unit_vectors(61)
    pairs = find_pairs(vectors, names, SETTINGS)
    assert len(pairs) > 40
    assert indices(pairs) == by_brute_force(vectors, SETTINGS)


def test_near_duplicates_and_unrelated_images_form_no_pair_and_no_image_is_used_more_than_max_uses_times() -> None:
    vectors, names = unit_vectors(61)
    vectors[1], vectors[2] = vectors[0], -vectors[0]
    settings = SETTINGS.model_copy(update={"max_uses": 1})
    pairs = find_pairs(vectors, names, settings)
    assert (0, 1) not in indices(pairs) and (0, 2) not in indices(pairs)
    assert max(Counter(index for pair in indices(pairs) for index in pair).values()) == 1
    assert all(0.5 <= pair.similarity <= 0.9 for pair in pairs)


def test_the_before_image_of_a_pair_is_chosen_at_random() -> None:
    pairs = find_pairs(*unit_vectors(61), SETTINGS)
    assert 0.3 < np.mean([pair.before < pair.after for pair in pairs]) < 0.7


def test_the_approximate_search_finds_most_pairs_of_the_exact_search(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, names = unit_vectors(2000, seed=3)
    settings = SETTINGS.model_copy(update={"num_neighbors": 8, "min_similarity": 0.6})
    exact = set(indices(find_pairs(vectors, names, settings)))
    monkeypatch.setattr(retrieval, "EXACT_UP_TO", 100)
    pairs = set(indices(find_pairs(vectors, names, settings)))
    assert len(exact & pairs) > 0.9 * len(exact)
    assert pairs == set(indices(find_pairs(vectors, names, settings)))


def test_a_collection_with_fewer_images_than_num_neighbors_is_accepted() -> None:
    vectors, names = unit_vectors(3)
    assert indices(find_pairs(vectors, names, SETTINGS)) == by_brute_force(vectors, SETTINGS)
    assert find_pairs(vectors[:1], names[:1], SETTINGS) == []


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


def test_a_collection_is_embedded_in_order_and_broken_images_are_listed(
        clip: str, collection: list[Entry], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "PART", 3)
    runtime = Runtime(workers=2, scratch=str(tmp_path / "scratch"), device="cpu")
    parts = list(embed_collection(collection, clip, runtime, max_megapixels=1))
    assert [name for part in parts for name in part.names] == [f"{k:02d}.png" for k in range(11) if k != 4]
    assert list({name: why for part in parts for name, why in part.unreadable.items()}) == ["04.png"]
    expected = Embedder(clip, "cpu").images([picture(k) for k in range(11) if k != 4])
    assert np.concatenate([part.vectors for part in parts]) == pytest.approx(expected, abs=1e-6)
    assert len(list((tmp_path / "scratch").rglob("*.npy"))) == 4


def test_an_embedding_is_computed_again_only_after_the_image_has_changed(clip: str, collection: list[Entry],
                                                                         tmp_path: Path) -> None:
    runtime = Runtime(workers=1, scratch=str(tmp_path / "scratch"), device="cpu")
    [first] = embed_collection(collection, clip, runtime, max_megapixels=1)
    [stored] = (tmp_path / "scratch").rglob("*.npy")
    np.save(stored, first.vectors + 1)
    [second] = embed_collection(collection, clip, runtime, max_megapixels=1)
    assert np.array_equal(second.vectors, first.vectors + 1)
    file = io.BytesIO()
    picture(99).save(file, "PNG")
    collection[0].path.write_bytes(file.getvalue())
    [changed] = embed_collection(collection, clip, runtime, max_megapixels=1)
    assert not np.allclose(changed.vectors, first.vectors + 1)
