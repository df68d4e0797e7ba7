"""Captions against references: BLEU-1..4, METEOR, ROUGE-L, CIDEr and SPICE, equal to pycocoevalcap's.

The tokenizer and METEOR are its Java programs, which start together and stay for later calls. BLEU, ROUGE-L and CIDEr
are computed here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pkgutil import resolve_name

from onediff.eval.metrics import ngrams, spice, words
from onediff.eval.metrics.catalog import CATALOG, METRICS, OPTIONAL
from onediff.eval.metrics.meteor import Meteor, sums
from onediff.eval.metrics.ngrams import Numbers, Sentences
from onediff.eval.metrics.words import Predictions, References, check_keys, tokenized

_meteor = Meteor()  # starts no Java before its first use


@dataclass(frozen=True)
class Scores:
    """`corpus`: one number per metric; `items`: one per pair, in the order of the references; `statistics` of BLEU and
    METEOR: a row per pair, whose sums over any pairs decide the corpus score of these (onediff/eval/resample.py).
    """

    corpus: dict[str, float]
    items: dict[str, list[float]]
    statistics: dict[str, Numbers]


def start(metrics: Sequence[str] = METRICS) -> None:
    """Begins to load the Java programs that these metrics need, and returns at once; `score` does so, too."""
    words.start()
    if "METEOR" in metrics:
        _meteor.program.start()


def score(predictions: Predictions, references: References, *, metrics: Sequence[str] = METRICS) -> Scores:
    """BLEU, METEOR, ROUGE-L and SPICE from 0 to 1, CIDEr-D from 0 to 10 (papers print all of them times 100).

    METEOR takes some seconds to start, once in a process: the others are computed meanwhile. SPICE takes minutes, and
    downloads what it needs once. An empty prediction scores 0, and so does any prediction for a pair whose only
    reference is empty: seven test pairs of Spot-the-Diff are published so, and papers score them.
    Raises ValueError if the keys differ, or if a Java program or a download fails; then nothing is scored.
    """
    unknown = [name for name in metrics if name not in METRICS + OPTIONAL]
    if unknown:
        raise ValueError(f"unknown metrics {unknown}; known are {[*METRICS, *OPTIONAL]}")
    check_keys(predictions, references)
    if "SPICE" in metrics:
        spice.fetch()
    start(metrics)
    sentences = ngrams.read(tokenized(predictions, references))
    chosen = sorted((metric for metric in CATALOG if metric.name in metrics), key=lambda metric: metric.slow)
    computed: list[Scores] = [resolve_name(function)(sentences)
                              for function in dict.fromkeys(str(metric.function) for metric in chosen)]
    scores = {name: part for part in computed for name in part.corpus}
    return Scores({name: scores[name].corpus[name] for name in metrics},
                  {name: scores[name].items[name] for name in metrics},
                  {name: scores[name].statistics[name] for name in metrics if name in scores[name].statistics})


def bleu_scores(sentences: Sentences) -> Scores:
    counts = ngrams.bleu_counts(sentences)
    total = counts.sum(0, keepdims=True)
    orders = {f"BLEU-{order}": order for order in range(1, ngrams.ORDERS + 1)}
    return Scores({name: float(ngrams.bleu(total, order)[0]) for name, order in orders.items()},
                  {name: ngrams.bleu(counts, order).tolist() for name, order in orders.items()},
                  dict.fromkeys(orders, counts))


def meteor_scores(sentences: Sentences) -> Scores:
    corpus, items, counts = _meteor.score(sentences.pairs)
    return Scores({"METEOR": corpus}, {"METEOR": items}, {"METEOR": sums(counts)})


def rouge_scores(sentences: Sentences) -> Scores:
    return _mean("ROUGE-L", ngrams.rouge(sentences.pairs))


def cider_scores(sentences: Sentences) -> Scores:
    return _mean("CIDEr", ngrams.cider(sentences))


def spice_scores(sentences: Sentences) -> Scores:
    return _mean("SPICE", spice.spice(sentences.pairs))


def _mean(name: str, values: Numbers) -> Scores:
    return Scores({name: float(values.mean())}, {name: values.tolist()}, {})
