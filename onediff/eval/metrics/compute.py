"""Score captions against references with BLEU-1 to BLEU-4, METEOR, ROUGE-L, CIDEr and SPICE.

The scores are equal to those of pycocoevalcap. The tokenizer and METEOR are the Java programs of pycocoevalcap; both
are started at the same time and keep running for later calls. BLEU, ROUGE-L and CIDEr are computed in Python.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pkgutil import resolve_name

from onediff.eval.metrics import ngrams, spice, words
from onediff.eval.metrics.catalog import CATALOG, METRICS, OPTIONAL
from onediff.eval.metrics.meteor import Meteor, sums
from onediff.eval.metrics.ngrams import Numbers, Sentences
from onediff.eval.metrics.words import Predictions, References, check_keys, tokenized

_meteor = Meteor()  # The constructor does not start Java; the first call of `start` or `score` starts Java.


@dataclass(frozen=True)
class Scores:
    """Scores of one system on a set of pairs, by metric.

    `corpus` maps a metric to one score for all pairs. `items` maps a metric to the score of each pair, in the order of
    the references. `statistics` maps each BLEU metric and METEOR to an array with one row of counts for each pair; the
    corpus score of any subset of the pairs is computed from the sum of their rows (see onediff/eval/resample.py).
    """

    corpus: dict[str, float]
    items: dict[str, list[float]]
    statistics: dict[str, Numbers]


def start(metrics: Sequence[str] = METRICS) -> None:
    """Start the Java programs that the metrics need, and return without waiting until they are ready.

    `score` also starts these programs; an earlier call of `start` only makes the waiting time in `score` shorter.
    """
    words.start()
    if "METEOR" in metrics:
        _meteor.program.start()


def score(predictions: Predictions, references: References, *, metrics: Sequence[str] = METRICS) -> Scores:
    """Score predictions against references: CIDEr-D from 0 to 10, all other metrics from 0 to 1.

    Papers print all scores times 100. The first call waits some seconds until METEOR has started; the other metrics are
    computed during this time. SPICE takes minutes, and downloads 384 MB when it is used for the first time.

    An empty prediction scores 0. If the only reference of a pair is empty, any prediction for this pair scores 0:
    Spot-the-Diff was published with seven such test pairs, and papers include these pairs in their scores.

    Raises ValueError if predictions and references have different pair_ids, or if a Java program or a download fails.
    """
    unknown = [name for name in metrics if name not in METRICS + OPTIONAL]
    if unknown:
        raise ValueError(f"metrics must be among {[*METRICS, *OPTIONAL]}, got {unknown}")
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
    """Return BLEU-1 to BLEU-4. Papineni et al., ACL 2002."""
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
