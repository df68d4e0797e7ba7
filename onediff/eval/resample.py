"""Bootstrap intervals of corpus scores, and paired tests of the difference between two systems.

A corpus score follows from sums of statistics over the pairs. A resample therefore only adds up rows of statistics;
no caption is scored again. Groups of pairs that share a scene or photograph are drawn together.

Shapes:  n pairs, G groups, R resamples, k columns of statistics of a metric.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onediff.eval.metrics import meteor
from onediff.eval.metrics.compute import Scores
from onediff.eval.metrics.ngrams import Numbers, bleu

RESAMPLES = 10_000
CHUNK = 500  # number of bootstrap resamples that are held in memory at the same time


@dataclass(frozen=True)
class Comparison:
    """The scores `first` and `second` of two systems on the same pairs for one metric, and a test of their difference.

    `low` and `high` are the ends of the 95 % interval of `first` minus `second`. `p` is the two-sided p-value: the
    probability of a difference at least as large if both systems were equally good.
    """

    first: float
    second: float
    low: float
    high: float
    p: float


def restricted(scores: Scores, chosen: Sequence[int]) -> Scores:
    """Return the scores on a subset of the pairs. `chosen` has the positions of these pairs.

    The document frequencies of CIDEr are not counted again: they are those of all pairs in `scores`.
    """
    if len(chosen) == len(next(iter(scores.items.values()))):
        return scores
    places = np.asarray(chosen, dtype=int)
    corpus = {name: float(corpus_score(name, shares_of(scores, name)[places].sum(0)[None])[0])
              for name in scores.corpus}
    return Scores(corpus, {name: [values[place] for place in places] for name, values in scores.items.items()},
                  {name: rows[places] for name, rows in scores.statistics.items()})


def intervals(scores: Scores, groups: Sequence[str], *, resamples: int = RESAMPLES,
              seed: int = 0) -> dict[str, list[float]]:
    """Return the 95 % interval of each corpus score from a percentile bootstrap, as {metric: [low, high]}.

    The bootstrap draws groups of pairs; `groups` has the group of each pair. The document frequencies of CIDEr are the
    same in all resamples.
    """
    drawn, = resampled([scores], groups, resamples=resamples, seed=seed)
    return {name: _interval(values) for name, values in drawn.items()}


def compare(first: Scores, second: Scores, groups: Sequence[str], *, resamples: int = RESAMPLES,
            seed: int = 0) -> dict[str, Comparison]:
    """Compare two systems with a paired bootstrap, and return a Comparison for each metric.

    Each resample draws the same groups of pairs for both systems (Koehn, EMNLP 2004). Raises ValueError if the two
    systems have scores of different metrics or of different numbers of pairs.
    """
    if list(first.corpus) != list(second.corpus):
        raise ValueError(f"two systems must have scores of the same metrics, got {list(first.corpus)} and "
                         f"{list(second.corpus)}; score both systems with the same list of metrics")
    ours, theirs = resampled([first, second], groups, resamples=resamples, seed=seed)
    comparisons = {}
    for name, score in first.corpus.items():
        difference = ours[name] - theirs[name]
        # The observed pairs count as one more resample. Therefore we add 1, and p is never 0.
        tail = 1 + min(int((difference <= 0).sum()), int((difference >= 0).sum()))
        low, high = _interval(difference)
        comparisons[name] = Comparison(score, second.corpus[name], low, high,
                                       min(1.0, 2 * tail / (len(difference) + 1)))
    return comparisons


def resampled(systems: Sequence[Scores], groups: Sequence[str], *, resamples: int,
              seed: int) -> list[dict[str, Numbers]]:
    """Return the corpus scores of each system on all bootstrap resamples.

    The list has one dict for each system; it maps a metric to the scores on all resamples, (R,). All systems get the
    same resamples, because drawing resamples takes most of the time. The same groups and seed give the same resamples.
    Raises ValueError if the number of groups differs from the number of pairs.
    """
    names, place = np.unique(np.asarray(groups, dtype=object).astype(str), return_inverse=True)
    sums: dict[tuple[int, str], Numbers] = {}
    for number, scores in enumerate(systems):
        for name in scores.corpus:
            shares = shares_of(scores, name)
            if len(shares) != len(groups):
                raise ValueError(f"`groups` must have one entry for each pair, got {len(groups)} entries for "
                                 f"{len(shares)} pairs; give the group_id of each scored pair")
            sums[number, name] = np.zeros((len(names), shares.shape[1]))  # (G, k)
            np.add.at(sums[number, name], place, shares)
    rng = np.random.default_rng(seed)
    chunks: dict[tuple[int, str], list[Numbers]] = {key: [] for key in sums}
    for start in range(0, resamples, CHUNK):
        times = rng.multinomial(len(names), np.full(len(names), 1 / len(names)),
                                size=min(CHUNK, resamples - start)).astype(float)  # (R, G)
        for key, each in sums.items():
            chunks[key].append(corpus_score(key[1], times @ each))
    return [{name: np.concatenate(chunks[number, name]) for name in scores.corpus}
            for number, scores in enumerate(systems)]


def corpus_score(name: str, sums: Numbers) -> Numbers:
    """Return the corpus score of a metric on each of R sets of pairs, (R,).

    `sums` (R, k) has one row for each set: the k statistics of `shares_of`, summed over the pairs of the set.
    """
    if name.startswith("BLEU-"):
        return bleu(sums, int(name[-1]))
    return meteor.meteor(sums) if name == "METEOR" else sums[:, 0] / sums[:, 1]


def shares_of(scores: Scores, name: str) -> Numbers:
    """Return the statistics of each pair that are summed for the corpus score of a metric, (n pairs, k statistics).

    The corpus score of a metric without `statistics` is a mean, so the two statistics of a pair are its score and 1.
    """
    if name in scores.statistics:
        return scores.statistics[name]
    return np.stack([np.asarray(scores.items[name]), np.ones(len(scores.items[name]))], 1)


def _interval(values: Numbers) -> list[float]:
    return [float(bound) for bound in np.quantile(values, (0.025, 0.975))]
