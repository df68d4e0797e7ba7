from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from onediff.config import Retrieval
from onediff.data import retrieval
from onediff.data.retrieval import Match, find_pairs

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


def places(pairs: list[Match]) -> list[tuple[int, int]]:
    return [(min(pair.before, pair.after), max(pair.before, pair.after)) for pair in pairs]


def test_pairs_equal_those_of_a_search_through_all() -> None:
    vectors, names = unit(61)
    found = find_pairs(vectors, names, SETTINGS)
    assert len(found) > 40
    assert places(found) == by_brute_force(vectors, SETTINGS)


def test_near_duplicates_and_unrelated_images_stay_out_and_no_image_is_used_too_often() -> None:
    vectors, names = unit(61)
    vectors[1], vectors[2] = vectors[0], -vectors[0]
    settings = SETTINGS.model_copy(update={"max_uses": 1})
    found = find_pairs(vectors, names, settings)
    assert (0, 1) not in places(found) and (0, 2) not in places(found)
    assert max(Counter(place for pair in places(found) for place in pair).values()) == 1
    assert all(0.5 <= pair.similarity <= 0.9 for pair in found)


def test_either_image_may_come_first() -> None:
    found = find_pairs(*unit(61), SETTINGS)
    assert 0.3 < np.mean([pair.before < pair.after for pair in found]) < 0.7


def test_an_inverted_file_finds_nearly_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, names = unit(2000, seed=3)
    settings = SETTINGS.model_copy(update={"num_neighbors": 8, "min_similarity": 0.6})
    exact = set(places(find_pairs(vectors, names, settings)))
    monkeypatch.setattr(retrieval, "EXACT_UP_TO", 100)
    found = set(places(find_pairs(vectors, names, settings)))
    assert len(exact & found) > 0.9 * len(exact)
    assert found == set(places(find_pairs(vectors, names, settings)))


def test_fewer_images_than_neighbours_are_no_trouble() -> None:
    vectors, names = unit(3)
    assert places(find_pairs(vectors, names, SETTINGS)) == by_brute_force(vectors, SETTINGS)
    assert find_pairs(vectors[:1], names[:1], SETTINGS) == []
