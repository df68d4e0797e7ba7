"""Which pairs form batch number `step`: sources by weight, each source in shuffled order without replacement."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from onediff.data.record import digest

CYCLE = 1000  # weights are kept to one part in this


class Mixture:
    """A pure function from (seed, step, size) to indices: a resumed run draws what an uninterrupted one would."""

    def __init__(self, indices_by_source: dict[str, list[int]], weights: dict[str, float], seed: int) -> None:
        """Raises ValueError for a weight that is not positive and for a source without pairs."""
        if not weights:
            raise ValueError("mixture: no source; name at least one with its weight")
        for name, weight in weights.items():
            if not weight > 0:
                raise ValueError(f"mixture.{name}: weight must be above 0, got {weight}; leave the source out instead")
            if not indices_by_source.get(name):
                raise ValueError(
                    f"mixture.{name}: no pairs of this source; sources with pairs: {sorted(indices_by_source)}"
                )
        self.seed = seed
        self.names = list(weights)
        self.indices = [np.array(indices_by_source[name]) for name in self.names]
        self.turns = _turns(weights)
        taken = self.turns[:, None] == np.arange(len(self.names))
        none_yet = np.zeros(len(self.names), dtype=int)
        self.before = np.vstack(
            [none_yet, taken.cumsum(axis=0)]
        )  # how often it was a source's turn earlier in the cycle

    def batch(self, step: int, size: int) -> list[int]:
        return [self._draw(slot) for slot in range(step * size, (step + 1) * size)]

    def _draw(self, slot: int) -> int:
        cycle, offset = divmod(slot, CYCLE)
        source = int(self.turns[offset])
        position = cycle * int(self.before[-1, source]) + int(self.before[offset, source])
        epoch, place = divmod(position, len(self.indices[source]))
        return int(self.indices[source][_order(self.seed, self.names[source], epoch, len(self.indices[source]))[place]])


def source_turns(weights: dict[str, float]) -> list[str]:
    """Whose turn it is in each of CYCLE slots."""
    names = list(weights)
    return [names[turn] for turn in _turns(weights)]


def _turns(weights: dict[str, float]) -> NDArray[np.int64]:
    """CYCLE turns, spread evenly: each goes to the source that is furthest behind its share."""
    parts = np.array(list(weights.values()), dtype=np.float64)
    share = parts / parts.sum()
    given = np.zeros(len(share))
    turns = np.empty(CYCLE, dtype=np.int64)
    for turn in range(CYCLE):
        turns[turn] = np.argmax(share * (turn + 1) - given)
        given[turns[turn]] += 1
    return turns


@lru_cache(maxsize=64)
def _order(seed: int, name: str, epoch: int, length: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, int(digest(name.encode())[:8], 16), epoch]).permutation(length)
