"""Everything that metrics.json says about a source: a table for each of its benchmarks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from onediff.eval.analysis.behaviour import RATES, edit_behaviour, edit_checks, scene_behaviour, scene_checks
from onediff.eval.analysis.language import language
from onediff.eval.floors import floor_captions, leave_one_out, oracle
from onediff.eval.metrics.compute import METRICS, RANGES, Predictions, References, Scores, score
from onediff.eval.protocols import (
    Protocol,
    Row,
    chosen_rows,
    protocol_of,
    protocols_of,
    references_digest,
    texts_of,
)
from onediff.eval.resample import intervals, restricted

PAIR_METRICS = ("CIDEr", "ROUGE-L")  # whose corpus score is the mean of the pairs'
REQUIRED = ("num_pairs", "protocol", "references", *METRICS)  # keys that the table of every benchmark has
# The least and the greatest value that a figure can have, wherever its name stands in a table.
FIGURE_RANGES = {**RANGES, **dict.fromkeys((*RATES, "pixel_difference_auc"), (0.0, 1.0)),
                 "oracle_CIDEr": RANGES["CIDEr"]}


def checks(source: str, prediction: str, row: Row) -> dict[str, bool]:
    """What the source's parser says about one prediction; empty where no parser reads the captions."""
    grammar = protocol_of(source).grammar
    return {"scenes": scene_checks, "edits": edit_checks}[grammar](prediction, row) if grammar else {}


def evaluate(source: str, predictions: Predictions, rows: Sequence[Row], *, train: Sequence[Row],
             nearest: Mapping[str, Row] | None = None) -> dict[str, dict[str, Any]]:
    """benchmark -> scores, floors and behaviour, and under "pairs" what each pair scored.

    `train`: the rows whose captions the floors may use; `nearest`: for each pair the one of these with the nearest
    pixels.

    Raises ValueError if predictions and rows do not match.
    """
    found = {}
    for joined, same in groupby(protocols_of(source).items(), key=lambda item: item[1].joined):
        references = {row["pair_id"]: texts_of(row, joined=joined) for row in rows}
        said = {"": predictions, **floor_captions(train, references, nearest=nearest, joined=joined)}
        scores = {who: score(texts, references) for who, texts in said.items()}
        for key, protocol in same:
            if not chosen_rows(protocol, rows):
                continue  # a gate split, for one, need not hold unchanged pairs
            found[key] = _table(protocol, rows, references, scores, said)
    told = language(predictions.values(), [text for row in train for text in row["references"]])
    return {key: {**table, "language": told} for key, table in found.items()}


def _table(protocol: Protocol, rows: Sequence[Row], references: References, scores: Mapping[str, Scores],
           said: Mapping[str, Predictions]) -> dict[str, Any]:
    chosen = chosen_rows(protocol, rows)
    own, part = [rows[place] for place in chosen], {who: restricted(all_, chosen) for who, all_ in scores.items()}
    floors: dict[str, dict[str, Any]] = {who: dict(part[who].corpus) for who in part if who}
    if "constant" in floors:
        floors["constant"]["sentence"] = next(iter(said["constant"].values()))
    bounds = intervals(part[""], [row["group_id"] for row in own])
    result: dict[str, Any] = {
        **part[""].corpus, "score_intervals": {name: list(both) for name, both in bounds.items()},
        "num_pairs": len(own), "protocol": protocol.name, "references": references_digest(references), "floor": floors,
        "leave_one_out": {} if protocol.only else leave_one_out(references),
        "by_change_type": _by_change_type(part[""], own)}
    result["pairs"] = {**{key: result[key] for key in ("protocol", "references")},
                       **{key: [row[key] for row in own] for key in ("pair_id", "group_id")},
                       **{name: part[""].items[name] for name in PAIR_METRICS}}
    if protocol.grammar == "scenes":
        result |= scene_behaviour(said[""], own)
        result["changed"] = _changed(part[""], own)
    if protocol.grammar == "edits":
        result |= edit_behaviour(said[""], own)
    return result


def _by_change_type(scores: Scores, rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Mean CIDEr and ROUGE-L of the pairs of each type; document frequencies are those of the whole split."""
    places: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        places.setdefault(row["change_type"], []).append(place)
    return {kind: {"num_pairs": len(chosen), "CIDEr": _mean(scores.items["CIDEr"], chosen),
                   "ROUGE-L": _mean(scores.items["ROUGE-L"], chosen)} for kind, chosen in sorted(places.items())}


def _changed(scores: Scores, rows: Sequence[Row]) -> dict[str, float]:
    """CIDEr on the changed pairs beside that of an oracle; document frequencies are those of the whole split."""
    references = {row["pair_id"]: list(row["references"]) for row in rows}
    truths = score({row["pair_id"]: oracle(row) for row in rows}, references, metrics=["CIDEr"])
    chosen = [place for place, row in enumerate(rows) if row["change_type"] != "none"]
    if not chosen:
        return {"num_pairs": 0}
    ours, best = _mean(scores.items["CIDEr"], chosen), _mean(truths.items["CIDEr"], chosen)
    ratio = {"oracle_ratio": ours / best} if best else {}  # one pair alone has no document frequencies
    return {"num_pairs": len(chosen), "CIDEr": ours, "oracle_CIDEr": best, **ratio}


def _mean(values: Sequence[float], chosen: Sequence[int]) -> float:
    return sum(values[place] for place in chosen) / len(chosen)
