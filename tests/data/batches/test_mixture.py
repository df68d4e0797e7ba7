from __future__ import annotations

from collections import Counter

import pytest

from onediff.data.batches.mixture import Mixture

INDICES = {"a": list(range(0, 13)), "b": list(range(100, 107)), "c": list(range(200, 231))}


def drawn(mixture: Mixture, size: int, steps: int) -> list[int]:
    return [index for step in range(steps) for index in mixture.batch(step, size)]


def test_each_source_is_visited_once_per_epoch_in_an_order_that_changes() -> None:
    mixture = Mixture(INDICES, {"a": 3, "b": 1, "c": 2}, seed=7)
    everything = drawn(mixture, 17, 300)
    for indices in INDICES.values():
        own = [index for index in everything if index in indices]
        epochs = [own[i:i + len(indices)] for i in range(0, len(own) - len(indices), len(indices))]
        assert len(epochs) > 10
        assert all(sorted(epoch) == indices for epoch in epochs)
        assert epochs[0] != epochs[1]


def test_weights_are_shares_of_every_stretch_of_batches() -> None:
    mixture = Mixture(INDICES, {"a": 3, "b": 1}, seed=7)
    for step in range(40):
        counts = Counter(index // 100 for index in mixture.batch(step, 64))
        assert counts == {0: 48, 1: 16}


def test_a_batch_depends_on_its_step_alone() -> None:
    weights = {"a": 2.5, "b": 0.7, "c": 1.1}
    straight = [Mixture(INDICES, weights, seed=7).batch(step, 19) for step in range(120)]
    resumed = Mixture(INDICES, weights, seed=7)
    assert [resumed.batch(step, 19) for step in reversed(range(120))] == straight[::-1]
    assert Mixture(INDICES, weights, seed=8).batch(0, 19) != straight[0]
    assert [index for batch in straight for index in batch] == drawn(resumed, 1, 120 * 19)


def test_a_small_weight_still_gets_its_turn() -> None:
    counts = Counter(index // 100 for index in drawn(Mixture(INDICES, {"a": 99, "b": 1}, seed=7), 50, 60))
    assert counts == {0: 2970, 1: 30}


def test_wrong_mixtures_are_refused() -> None:
    with pytest.raises(ValueError, match=r"mixture\.a: weight must be above 0, got 0"):
        Mixture(INDICES, {"a": 0}, seed=7)
    with pytest.raises(ValueError, match=r"mixture\.z: no pairs of this source"):
        Mixture(INDICES, {"z": 1}, seed=7)
    with pytest.raises(ValueError, match="no source"):
        Mixture(INDICES, {}, seed=7)
