"""How far chance moves a corpus score: bootstrap over what each pair adds to it, so that no text is read again.

Shapes:  n pairs, G groups (pairs of one scene or photograph, which are drawn together), R resamples,
         k columns of statistics whose sums over the pairs decide a metric.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onediff.eval.metrics import Scores

Numbers = NDArray[np.float64]
RESAMPLES = 10_000
CHUNK = 500  # resamples whose draws are in memory at once
BLEU_SMALL, BLEU_TINY = 1e-9, 1e-15  # pycocoevalcap's, against division by 0
# METEOR 1.5 for English: Denkowski and Lavie, WMT 2014. Stages: exact word, stem, synonym, paraphrase.
ALPHA, BETA, GAMMA, DELTA, STAGES = 0.85, 0.2, 0.6, 0.75, (1.0, 0.6, 0.8, 0.6)


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
    ours, theirs = (resampled(scores, groups, resamples=resamples, seed=seed) for scores in (first, second))
    return {name: Compared(first.corpus[name], second.corpus[name], *_middle(ours[name] - theirs[name]),
                           _two_sided(ours[name] - theirs[name])) for name in first.corpus}


def resampled(scores: Scores, groups: Sequence[str], *, resamples: int, seed: int) -> dict[str, Numbers]:
    """Each metric's value on each resample (R,). The same groups and seed draw the same resamples.

    Raises ValueError unless there is a group for each pair.
    """
    shares = {name: shares_of(scores, name) for name in scores.corpus}
    if any(len(share) != len(groups) for share in shares.values()):
        raise ValueError(f"one group for each pair is needed, got {len(groups)} for "
                         f"{', '.join(str(len(share)) for share in shares.values())} pairs")
    names, place = np.unique(np.asarray(groups, dtype=object).astype(str), return_inverse=True)
    sums = {name: _by_group(share, place, len(names)) for name, share in shares.items()}  # (G, k)
    rng = np.random.default_rng(seed)
    found: dict[str, list[Numbers]] = {name: [] for name in shares}
    for start in range(0, resamples, CHUNK):
        times = rng.multinomial(len(names), np.full(len(names), 1 / len(names)),
                                size=min(CHUNK, resamples - start)).astype(float)  # (R, G)
        for name, each in sums.items():
            found[name].append(corpus_score(name, times @ each))
    return {name: np.concatenate(parts) for name, parts in found.items()}


def corpus_score(name: str, sums: Numbers) -> Numbers:
    """sums (R, k) of the statistics of some pairs -> their corpus score (R,)."""
    if name.startswith("BLEU-"):
        return bleu(sums, int(name[-1]))
    return meteor(sums) if name == "METEOR" else sums[:, 0] / sums[:, 1]


def bleu(sums: Numbers, order: int) -> Numbers:
    """sums (R, 10): length, the closest reference's length, n-grams 1 to 4 said, those that are right -> (R,)."""
    said, right = sums[:, 2 : 2 + order], sums[:, 6 : 6 + order]
    precision = ((right + BLEU_TINY) / (said + BLEU_SMALL)).prod(1) ** (1 / order)
    ratio = (sums[:, 0] + BLEU_TINY) / (sums[:, 1] + BLEU_SMALL)
    return np.asarray(precision * np.exp(np.minimum(0.0, 1 - 1 / ratio)))


def meteor(sums: Numbers) -> Numbers:
    """sums (R, 23) of the statistics that METEOR's program gives for each pair, but no chunk where all words match in
    one -> (R,).
    """
    length, function = sums[:, :2], sums[:, 2:4]  # of the prediction, of the reference
    content, functional = (sums[:, 4:20].reshape(-1, 4, 2, 2)[:, :, part] for part in (0, 1))  # (R, 4 stages, 2 sides)
    stages = np.array(STAGES)[:, None]
    matched = (stages * (DELTA * content + (1 - DELTA) * functional)).sum(1)  # (R, 2)
    weight = DELTA * (length - function) + (1 - DELTA) * function
    precision, recall = _ratio(matched, weight).T
    mean = _ratio(precision * recall, ALPHA * precision + (1 - ALPHA) * recall)
    broken = _ratio(sums[:, 20], sums[:, 21:23].mean(1))  # chunks to words
    return np.asarray(mean * (1 - GAMMA * broken**BETA))


def shares_of(scores: Scores, name: str) -> Numbers:
    """What each pair adds to a metric's sums (n, k): the metric's own statistics, or its value on the pair and 1."""
    family = name.split("-")[0]
    if family == "METEOR":
        rows = scores.statistics[family].copy()
        rows[(rows[:, 21:23] == rows[:, :2]).all(1) & (rows[:, 20] == 1), 20] = 0
        return rows
    if family in scores.statistics:
        return scores.statistics[family]
    return np.stack([np.asarray(scores.items[name]), np.ones(len(scores.items[name]))], 1)


def _by_group(share: Numbers, place: NDArray[np.intp], num: int) -> Numbers:
    sums = np.zeros((num, share.shape[1]))
    np.add.at(sums, place, share)
    return sums


def _ratio(over: Numbers, under: Numbers) -> Numbers:
    return np.divide(over, under, out=np.zeros_like(over), where=under != 0)


def _middle(values: Numbers) -> tuple[float, float]:
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)


def _two_sided(differences: Numbers) -> float:
    tail = 1 + min(int((differences <= 0).sum()), int((differences >= 0).sum()))  # 1: what was seen is a draw, too
    return min(1.0, 2 * tail / (len(differences) + 1))
