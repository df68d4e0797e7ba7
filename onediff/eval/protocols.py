"""Which benchmark is scored how, and everything that is said about one in metrics.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from onediff.data.record import digest
from onediff.eval.behaviour import Row, edit_behaviour, edit_checks, scene_behaviour, scene_checks
from onediff.eval.floors import floors, leave_one_out, oracle
from onediff.eval.metrics import METRICS, Predictions, Scores, score
from onediff.eval.resample import intervals


@dataclass(frozen=True)
class Protocol:
    """`train_source`: whose training captions make the floors; `grammar`: which parser reads the captions, if any."""

    train_source: str
    grammar: str | None = None
    name: str = "coco-caption/v1"
    metrics: tuple[str, ...] = METRICS


PROTOCOLS = {"scenes": Protocol("scenes", "scenes"), "scenes_far": Protocol("scenes", "scenes"),
             "edits": Protocol("edits", "edits"),
             "spot_the_diff": Protocol("spot_the_diff", name="spot_the_diff/single/v1"),
             "image_editing_request": Protocol("image_editing_request", name="image_editing_request/v1"),
             "birds_to_words": Protocol("birds_to_words", name="birds_to_words/v1"),
             "clevr_change": Protocol("clevr_change", name="clevr_change/total/v1")}


def protocol_of(benchmark: str) -> Protocol:
    """A benchmark of one's own is scored by the COCO toolkit against all its references."""
    return PROTOCOLS.get(benchmark, Protocol(benchmark))


def checks(benchmark: str, prediction: str, row: Row) -> dict[str, bool]:
    """What the benchmark's parser says about one prediction; empty where no parser reads the captions."""
    grammar = protocol_of(benchmark).grammar
    return {"scenes": scene_checks, "edits": edit_checks}[grammar](prediction, row) if grammar else {}


def references_digest(references: Mapping[str, Sequence[str]]) -> str:
    """Names the references, whatever order the pairs come in: equal digests make scores comparable."""
    return digest(json.dumps({key: list(texts) for key, texts in references.items()}, sort_keys=True).encode())


def evaluate(benchmark: str, predictions: Predictions, rows: Sequence[Row], *, train: Sequence[str]) -> dict[str, Any]:
    """Scores, floors and behaviour of one benchmark; `train`: the training captions that the floors may use.

    Raises ValueError if predictions and rows do not match.
    """
    protocol = protocol_of(benchmark)
    references = {row["pair_id"]: list(row["references"]) for row in rows}
    scores = score(predictions, references, metrics=protocol.metrics)
    result: dict[str, Any] = {
        **scores.corpus, "score_intervals": {
            name: list(bounds) for name, bounds in intervals(scores, [row["group_id"] for row in rows]).items()},
        "num_pairs": len(rows), "protocol": protocol.name, "references": references_digest(references),
        "floor": floors(train, references, metrics=protocol.metrics) if train else {},
        "leave_one_out": leave_one_out(references, metrics=protocol.metrics),
        "by_change_type": _by_change_type(scores, rows)}
    if protocol.grammar == "scenes":
        result |= scene_behaviour(predictions, rows)
        result["changed"] = _changed(scores, rows)
    if protocol.grammar == "edits":
        result |= edit_behaviour(predictions, rows)
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
