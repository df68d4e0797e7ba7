"""How much the figures of a generated benchmark depend on the wording of the question."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from onediff.eval.analysis.behaviour import GRAMMARS
from onediff.eval.metrics.catalog import BEHAVIOUR, FAST_METRICS
from onediff.eval.metrics.compute import score
from onediff.eval.metrics.words import Predictions
from onediff.eval.protocols import PairRow, protocol_of


def own_question_scores(source: str, predictions: Predictions, rows: Sequence[PairRow]) -> dict[str, Any]:
    """Return caption scores and behaviour figures of captions that answer the own question of each record."""
    references = {row["pair_id"]: list(row["references"]) for row in rows}
    scores = score(predictions, references, metrics=FAST_METRICS).corpus
    return {"num_pairs": len(rows), **scores, **_figures(source, predictions, rows)}


def paraphrase_spread(source: str, lines: Sequence[Mapping[str, str]], default: Predictions,
                      rows: Sequence[PairRow]) -> dict[str, Any]:
    """Return how the behaviour figures of a sample of pairs vary with the wording of the question.

    `lines` have the captions, each with its pair_id, question and prediction; all questions have the same pairs.
    `default` has the captions that answer the default question. For each figure, the result has the value for the
    default question, and mean, lowest and highest value of the paraphrases ("default", "mean", "low", "high"). The
    result is empty if there are no lines.
    """
    if not lines:
        return {}
    by_question = {question: {line["pair_id"]: line["prediction"] for line in group}
                   for question, group in groupby(lines, key=lambda line: line["question"])}
    chosen = [row for row in rows if row["pair_id"] in {line["pair_id"] for line in lines}]
    figures = [_figures(source, predictions, chosen) for predictions in by_question.values()]
    plain = _figures(source, default, chosen)
    spread = {name: [each[name] for each in figures] for name in plain}
    return {"num_pairs": len(chosen), "num_questions": len(figures),
            **{name: {"default": plain[name], "mean": sum(values) / len(values), "low": min(values),
                      "high": max(values)} for name, values in spread.items()}}


def _figures(source: str, predictions: Predictions, rows: Sequence[PairRow]) -> dict[str, float]:
    behaviour = GRAMMARS[protocol_of(source).grammar].behaviour(predictions, rows)
    return {name: behaviour[name] for name in BEHAVIOUR if name in behaviour}
