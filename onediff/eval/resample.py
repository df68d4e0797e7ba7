"""How far chance moves a corpus score: bootstrap over what each pair adds to it, so that no text is read again.

Shapes:  n pairs, G groups (pairs of one scene or photograph, which are drawn together), R resamples,
         k columns of statistics whose sums over the pairs decide a metric.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onediff.eval.metrics import meteor
from onediff.eval.metrics.compute import Scores
from onediff.eval.metrics.ngrams import Numbers, bleu

RESAMPLES = 10_000
CHUNK = 500  # resamples whose draws are in memory at once


@dataclass(frozen=True)
class Comparison:
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
              seed: int = 0) -> dict[str, list[float]]:
    """95 % percentile intervals of the corpus scores. CIDEr's document frequencies stay those of all pairs."""
    drawn, = resampled([scores], groups, resamples=resamples, seed=seed)
    return {name: _interval(values) for name, values in drawn.items()}


def compare(first: Scores, second: Scores, groups: Sequence[str], *, resamples: int = RESAMPLES,
            seed: int = 0) -> dict[str, Comparison]:
    """Paired bootstrap: every resample draws the same groups for both. Koehn, EMNLP 2004.

    Raises ValueError if the two hold other metrics or numbers of pairs.
    """
    if list(first.corpus) != list(second.corpus):
        raise ValueError(f"both must have the same metrics, got {list(first.corpus)} and {list(second.corpus)}")
    ours, theirs = resampled([first, second], groups, resamples=resamples, seed=seed)
    comparisons = {}
    for name, score in first.corpus.items():
        difference = ours[name] - theirs[name]
        tail = 1 + min(int((difference <= 0).sum()), int((difference >= 0).sum()))  # 1: the observed one is a draw, too
        low, high = _interval(difference)
        comparisons[name] = Comparison(score, second.corpus[name], low, high,
                                       min(1.0, 2 * tail / (len(difference) + 1)))
    return comparisons


def resampled(systems: Sequence[Scores], groups: Sequence[str], *, resamples: int,
              seed: int) -> list[dict[str, Numbers]]:
    """Each metric's value on each resample (R,), of each system. The same groups and seed draw the same resamples; all
    systems get the same draws, which take most of the time.

    Raises ValueError unless there is a group for each pair.
    """
    names, place = np.unique(np.asarray(groups, dtype=object).astype(str), return_inverse=True)
    sums: dict[tuple[int, str], Numbers] = {}
    for number, scores in enumerate(systems):
        for name in scores.corpus:
            shares = shares_of(scores, name)
            if len(shares) != len(groups):
                raise ValueError(f"one group for each pair is needed, got {len(groups)} for {len(shares)} pairs")
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
    """sums (R, k) of the statistics of some pairs -> their corpus score (R,)."""
    if name.startswith("BLEU-"):
        return bleu(sums, int(name[-1]))
    return meteor.meteor(sums) if name == "METEOR" else sums[:, 0] / sums[:, 1]


def shares_of(scores: Scores, name: str) -> Numbers:
    """What each pair adds to a metric's sums (n, k): the metric's own statistics, or its value on the pair and 1."""
    if name in scores.statistics:
        return scores.statistics[name]
    return np.stack([np.asarray(scores.items[name]), np.ones(len(scores.items[name]))], 1)


def _interval(values: Numbers) -> list[float]:
    return [float(bound) for bound in np.quantile(values, (0.025, 0.975))]
