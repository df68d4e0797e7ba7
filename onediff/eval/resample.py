"""How far chance moves a corpus score: bootstrap over what each pair adds to it, so that no text is read again.

Shapes:  n pairs, G groups (pairs of one scene or photograph, which are drawn together), R resamples,
         k columns of statistics whose sums over the pairs decide a metric.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onediff.eval.metrics import meteor
from onediff.eval.metrics.compute import Scores
from onediff.eval.metrics.ngrams import bleu

Numbers = NDArray[np.float64]
RESAMPLES = 10_000
CHUNK = 500  # resamples whose draws are in memory at once


@dataclass(frozen=True)
class Compared:
    """Two systems on the same pairs: their scores, the difference, its 95 % interval, and how likely chance alone is
    to bring one as large in either direction (two-sided p).
    """

    first: float
    second: float
    low: float
    high: float
    p: float


def restricted(scores: Scores, chosen: Sequence[int]) -> Scores:
    """The scores of some pairs, which share the document frequencies of all that were scored."""
    if len(chosen) == len(next(iter(scores.items.values()))):
        return scores
    places = np.asarray(chosen, dtype=int)
    corpus = {name: float(corpus_score(name, shares_of(scores, name)[places].sum(0)[None])[0])
              for name in scores.corpus}
    return Scores(corpus, {name: [values[place] for place in places] for name, values in scores.items.items()},
                  {name: rows[places] for name, rows in scores.statistics.items()})


def intervals(scores: Scores, groups: Sequence[str], *, resamples: int = RESAMPLES,
              seed: int = 0) -> dict[str, tuple[float, float]]:
    """95 % percentile intervals of the corpus scores. CIDEr's document frequencies stay those of all pairs."""
    drawn = resampled(scores, groups, resamples=resamples, seed=seed)
    return {name: _middle(values) for name, values in drawn.items()}


def compare(first: Scores, second: Scores, groups: Sequence[str], *, resamples: int = RESAMPLES,
            seed: int = 0) -> dict[str, Compared]:
    """Paired bootstrap: every resample draws the same groups for both. Koehn, EMNLP 2004.

    Raises ValueError if the two hold other metrics or numbers of pairs.
    """
    if list(first.corpus) != list(second.corpus):
        raise ValueError(f"both must have the same metrics, got {list(first.corpus)} and {list(second.corpus)}")
    ours, theirs = _resampled([first, second], groups, resamples, seed)
    return {name: Compared(first.corpus[name], second.corpus[name], *_middle(ours[name] - theirs[name]),
                           _two_sided(ours[name] - theirs[name])) for name in first.corpus}


def resampled(scores: Scores, groups: Sequence[str], *, resamples: int, seed: int) -> dict[str, Numbers]:
    """Each metric's value on each resample (R,). The same groups and seed draw the same resamples.

    Raises ValueError unless there is a group for each pair.
    """
    return _resampled([scores], groups, resamples, seed)[0]


def _resampled(systems: Sequence[Scores], groups: Sequence[str], resamples: int, seed: int) -> list[dict[str, Numbers]]:
    """Of each system; all get the same draws, which take most of the time."""
    names, place = np.unique(np.asarray(groups, dtype=object).astype(str), return_inverse=True)
    sums = {(number, name): _by_group(share, place, len(names)) for number, scores in enumerate(systems)
            for name, share in _shares(scores, len(groups)).items()}  # (G, k)
    rng = np.random.default_rng(seed)
    found: dict[tuple[int, str], list[Numbers]] = {key: [] for key in sums}
    for start in range(0, resamples, CHUNK):
        times = rng.multinomial(len(names), np.full(len(names), 1 / len(names)),
                                size=min(CHUNK, resamples - start)).astype(float)  # (R, G)
        for key, each in sums.items():
            found[key].append(corpus_score(key[1], times @ each))
    return [{name: np.concatenate(found[number, name]) for name in scores.corpus}
            for number, scores in enumerate(systems)]


def _shares(scores: Scores, num_groups: int) -> dict[str, Numbers]:
    shares = {name: shares_of(scores, name) for name in scores.corpus}
    if any(len(share) != num_groups for share in shares.values()):
        raise ValueError(f"one group for each pair is needed, got {num_groups} for "
                         f"{', '.join(str(len(share)) for share in shares.values())} pairs")
    return shares


def corpus_score(name: str, sums: Numbers) -> Numbers:
    """sums (R, k) of the statistics of some pairs -> their corpus score (R,)."""
    if name.startswith("BLEU-"):
        return bleu(sums, int(name[-1]))
    return meteor.meteor(sums) if name == "METEOR" else sums[:, 0] / sums[:, 1]


def shares_of(scores: Scores, name: str) -> Numbers:
    """What each pair adds to a metric's sums (n, k): the metric's own statistics, or its value on the pair and 1."""
    family = name.split("-")[0]
    if family == "METEOR":
        return meteor.sums(scores.statistics[family])
    if family in scores.statistics:
        return scores.statistics[family]
    return np.stack([np.asarray(scores.items[name]), np.ones(len(scores.items[name]))], 1)


def _by_group(share: Numbers, place: NDArray[np.intp], num: int) -> Numbers:
    sums = np.zeros((num, share.shape[1]))
    np.add.at(sums, place, share)
    return sums


def _middle(values: Numbers) -> tuple[float, float]:
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)


def _two_sided(differences: Numbers) -> float:
    tail = 1 + min(int((differences <= 0).sum()), int((differences >= 0).sum()))  # 1: what was seen is a draw, too
    return min(1.0, 2 * tail / (len(differences) + 1))
