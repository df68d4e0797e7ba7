"""Compute the scores of a source (dataset) for metrics.json: one table for each benchmark of the source."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby, pairwise
from typing import Any

from onediff.eval.analysis.behaviour import GRAMMARS, by_change_type
from onediff.eval.floors import floor_captions, leave_one_out, oracle
from onediff.eval.metrics.catalog import PAIR_METRICS
from onediff.eval.metrics.compute import Scores, score
from onediff.eval.metrics.words import Predictions, References, clean
from onediff.eval.protocols import (
    PairRow,
    Protocol,
    chosen_rows,
    protocol_of,
    protocols_of,
    references_digest,
    texts_of,
)
from onediff.eval.resample import intervals, restricted


def checks(source: str, prediction: str, row: PairRow) -> dict[str, bool]:
    """Parse a predicted caption and return which parts of it are correct, such as {"type": True, "object": False}.

    Only captions of generated sources can be parsed, with the grammar that also generates their references. The result
    is empty for any other source.
    """
    grammar = GRAMMARS.get(protocol_of(source).grammar)
    return grammar.checks(prediction, row) if grammar else {}


def evaluate(source: str, predictions: Predictions, rows: Sequence[PairRow], *, train: Sequence[PairRow],
             nearest: Mapping[str, PairRow] | None = None) -> dict[str, dict[str, Any]]:
    """Return the score table of each benchmark of a source (dataset), as {key of the benchmark: table}.

    A table contains the scores of the predictions, the scores of the trivial baselines, and the behaviour figures,
    which count how often the change that a caption claims is correct. The key "pairs" of a table holds the scores of
    each pair.

    `rows` describe the test pairs. `train` are the training rows whose captions the trivial baselines use. `nearest`
    maps the pair_id of each test pair to the training row with the most similar images. Raises ValueError if
    predictions and rows do not have the same pair_ids.
    """
    tables = {}
    for joined, group in groupby(protocols_of(source).items(), key=lambda item: item[1].joined):
        references = {row["pair_id"]: texts_of(row, joined=joined) for row in rows}
        captions = {"": predictions, **floor_captions(train, references, nearest=nearest, joined=joined)}
        scores = {system: score(texts, references) for system, texts in captions.items()}
        for key, protocol in group:
            if chosen_rows(protocol, rows):  # A split may contain no pair that the protocol scores.
                tables[key] = _table(protocol, rows, references, captions, scores)
    style = language(predictions.values(), [text for row in train for text in row["references"]])
    return {key: {**table, "language": style} for key, table in tables.items()}


def _table(protocol: Protocol, rows: Sequence[PairRow], references: References, captions: Mapping[str, Predictions],
           scores: Mapping[str, Scores]) -> dict[str, Any]:
    """Return the score table of one benchmark.

    `captions` and `scores` have one entry for each system: the key "" stands for the model, and every other key is the
    name of a trivial baseline.
    """
    chosen = chosen_rows(protocol, rows)
    chosen_pairs = [rows[place] for place in chosen]
    part = {system: restricted(all_pairs, chosen) for system, all_pairs in scores.items()}
    items = part[""].items
    named = {"protocol": protocol.name, "references": references_digest(references)}
    table: dict[str, Any] = {
        **part[""].corpus, "score_intervals": intervals(part[""], [row["group_id"] for row in chosen_pairs]),
        "num_pairs": len(chosen_pairs), **named,
        "floor": {system: dict(part[system].corpus) for system in part if system},
        "leave_one_out": {} if protocol.only else leave_one_out(references),
        "by_change_type": {kind: {"num_pairs": len(places),
                                  **{name: _mean(items[name], places) for name in PAIR_METRICS}}
                           for kind, places in by_change_type(chosen_pairs).items()},
        "pairs": {**named, **{key: [row[key] for row in chosen_pairs] for key in ("pair_id", "group_id")},
                  **{name: items[name] for name in PAIR_METRICS}}}
    if "constant" in captions:
        table["floor"]["constant"]["sentence"] = next(iter(captions["constant"].values()))
    if protocol.grammar == "scenes":
        table["changed"] = _changed(part[""], chosen_pairs)
    if protocol.grammar:
        table |= GRAMMARS[protocol.grammar].behaviour(captions[""], chosen_pairs)
    return table


def _changed(scores: Scores, rows: Sequence[PairRow]) -> dict[str, float]:
    """Return the mean CIDEr of the changed pairs, for the model and for correct captions written by `floors.oracle`.

    The document frequencies of CIDEr are counted on all pairs of the split, changed and unchanged.
    """
    references = {row["pair_id"]: list(row["references"]) for row in rows}
    truths = score({row["pair_id"]: oracle(row) for row in rows}, references, metrics=["CIDEr"])
    chosen = [place for place, row in enumerate(rows) if row["change_type"] != "none"]
    if not chosen:
        return {"num_pairs": 0}
    ours, best = _mean(scores.items["CIDEr"], chosen), _mean(truths.items["CIDEr"], chosen)
    ratio = {"oracle_ratio": ours / best} if best else {}  # With only one pair, all word weights of CIDEr are 0.
    return {"num_pairs": len(chosen), "CIDEr": ours, "oracle_CIDEr": best, **ratio}


def _mean(values: Sequence[float], chosen: Sequence[int]) -> float:
    return sum(values[place] for place in chosen) / len(chosen)


def language(captions: Iterable[str], train: Sequence[str]) -> dict[str, float]:
    """Return figures that describe the language of the predicted captions.

    `words`: mean number of words per caption. `vocabulary`: number of distinct words. `different`: number of distinct
    captions divided by the number of captions. `distinct_1`: number of distinct words divided by the number of all
    words; `distinct_2`: the same ratio for pairs of adjacent words (Li et al., NAACL 2016). `empty`: share of empty
    captions. `copied`: share of captions that are identical to a caption in `train`; this key is missing if `train` is
    empty.
    """
    texts = [clean(text).lower() for text in captions]
    lines = [text.split() for text in texts]
    known = {clean(text).lower() for text in train}
    words = [word for line in lines for word in line]
    couples = [couple for line in lines for couple in pairwise(line)]
    copied = {"copied": sum(text in known for text in texts) / len(texts)} if known else {}
    return {"words": len(words) / len(texts), "vocabulary": len(set(words)), "different": len(set(texts)) / len(texts),
            "distinct_1": len(set(words)) / max(1, len(words)), "distinct_2": len(set(couples)) / max(1, len(couples)),
            "empty": texts.count("") / len(texts), **copied}
