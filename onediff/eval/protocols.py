"""Protocols: how each benchmark is scored, by name and version. Scores of two protocols never stand in one column.

Traps that these close: docs/protocols.md.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from onediff.eval.metrics.catalog import METRICS
from onediff.eval.metrics.compute import Scores, score
from onediff.eval.metrics.words import Predictions, References
from onediff.eval.resample import RESAMPLES, compare, intervals, restricted
from onediff.files import key_of

PairRow = Mapping[str, Any]  # pair_id, references; where known group_id, change_type, provenance


@dataclass(frozen=True)
class Protocol:
    """`source`: whose captions it scores; `train_source`: whose training captions make its floors; `grammar`: which
    parser reads them, if any. `joined`: all sentences of a pair are one reference. `only`: the table is about the
    "changed" or the "unchanged" pairs, with the document frequencies of the whole split. `num_pairs` and
    `num_references` (those with words): the official test split's. `id_key` and `text_key`: where its annotation file
    has one entry for each pair or part of one.
    """

    name: str
    source: str
    train_source: str
    grammar: str | None = None
    joined: bool = False
    only: str | None = None
    num_pairs: int | None = None
    num_references: int | None = None
    id_key: str | None = None
    text_key: str | None = None


SPOT_THE_DIFF = Protocol("spot_the_diff/single/v1", "spot_the_diff", "spot_the_diff", num_pairs=1270,
                         num_references=2107, id_key="img_id", text_key="sentences")
CLEVR_CHANGE = Protocol("clevr_change/total/v1", "clevr_change", "clevr_change", num_pairs=7970)
PROTOCOLS = {
    "scenes": Protocol("coco-caption/v1", "scenes", "scenes", grammar="scenes"),
    "scenes_far": Protocol("coco-caption/v1", "scenes_far", "scenes", grammar="scenes"),
    "edits": Protocol("coco-caption/v1", "edits", "edits", grammar="edits"),
    "spot_the_diff/single": SPOT_THE_DIFF,
    "spot_the_diff/multi": replace(SPOT_THE_DIFF, name="spot_the_diff/multi/v1", joined=True),
    "image_editing_request": Protocol("image_editing_request/v1", "image_editing_request", "image_editing_request",
                                      num_pairs=495, num_references=1485, id_key="uid", text_key="sents"),
    "birds_to_words": Protocol("birds_to_words/v1", "birds_to_words", "birds_to_words"),
    "clevr_change/total": CLEVR_CHANGE,
    "clevr_change/semantic": replace(CLEVR_CHANGE, name="clevr_change/semantic/v1", num_pairs=3985, only="changed"),
    "clevr_change/distractor": replace(CLEVR_CHANGE, name="clevr_change/distractor/v1", num_pairs=3985,
                                       only="unchanged"),
}


def protocols_of(source: str) -> dict[str, Protocol]:
    """Every benchmark of a source. An unknown source has one, by the COCO toolkit against all its references."""
    known = {key: protocol for key, protocol in PROTOCOLS.items() if protocol.source == source}
    return known or {source: Protocol("coco-caption/v1", source, source)}


def protocol_of(source: str) -> Protocol:
    """The first of them, which says how its captions are read and whose training captions are its own."""
    return next(iter(protocols_of(source).values()))


def texts_of(row: PairRow, *, joined: bool) -> list[str]:
    """The references of a pair; joined: all of them as one."""
    return [" ".join(text for text in row["references"] if text.strip())] if joined else list(row["references"])


def chosen_rows(protocol: Protocol, rows: Sequence[PairRow]) -> list[int]:
    """The places of the rows that the table is about. Raises ValueError if a row that must be chosen has no type."""
    if protocol.only is None:
        return list(range(len(rows)))
    untyped = [row["pair_id"] for row in rows if not row.get("change_type")]
    if untyped:
        raise ValueError(f"{protocol.name} is about {protocol.only} pairs, but {untyped[0]} has no 'change_type' "
                         "(none: unchanged); 'onediff references' writes it")
    return [place for place, row in enumerate(rows) if (row["change_type"] == "none") == (protocol.only == "unchanged")]


def check_counts(protocol: Protocol, rows: Sequence[PairRow]) -> None:
    """Raises ValueError unless the rows are as many as the official test split has, with as many references."""
    chosen = [rows[place] for place in chosen_rows(protocol, rows)]
    num_references = sum(bool(text.strip()) for row in chosen for text in row["references"])
    for what, official, got in (("pairs", protocol.num_pairs, len(chosen)),
                                ("references", protocol.num_references, num_references)):
        if official not in (None, got):
            raise ValueError(f"{protocol.name} scores the official test split with its {official:,} {what}, got "
                             f"{got:,}: take that split whole, or score without a protocol")


def references_digest(references: References) -> str:
    """Names the references, whatever order the pairs come in: equal digests make scores comparable."""
    return key_of(references)[:32]


# --- files -----------------------------------------------------------------------------------------------------------


def read_predictions(path: Path) -> Predictions:
    """The predictions of a JSONL file by pair_id. Raises ValueError naming file and line."""
    predictions = {key: row["prediction"] for key, row in read_rows(path, "prediction").items()}
    for key, text in predictions.items():
        if not isinstance(text, str):
            raise ValueError(f"{path}: 'prediction' of {key!r} must be a string, got {text!r}")
    return predictions


def read_rows(path: Path, field: str) -> dict[str, dict[str, Any]]:
    """pair_id -> the line, which has the field, in the order of the lines; blank lines are skipped."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: U+2028 may stand in a string
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} not found") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from None
    rows: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} line {number}: not valid JSON: {error.msg} at column {error.colno}") from None
        missing = [name for name in ("pair_id", field) if not isinstance(row, dict) or name not in row]
        if missing:
            raise ValueError(f"{path} line {number}: needs 'pair_id' and '{field}', missing {missing}")
        if not isinstance(row["pair_id"], str):
            raise ValueError(f"{path} line {number}: 'pair_id' must be a string, got {row['pair_id']!r}")
        if row["pair_id"] in rows:
            raise ValueError(f"{path} line {number}: duplicate pair_id {row['pair_id']!r}")
        rows[row["pair_id"]] = row
    return rows


def rounded(value: Any) -> Any:
    """A JSON value with floats of six decimal places, so that the order of a sum does not change the file."""
    return json.loads(json.dumps(value), parse_float=lambda digits: round(float(digits), 6))


def read_benchmark(path: Path, protocol: Protocol) -> list[PairRow]:
    """The rows of a JSONL file of references, or of the annotation file of the protocol's benchmark as published.

    Raises ValueError naming file and line or entry, or for counts that are not the official test split's.
    """
    published = protocol.id_key is not None and path.suffix == ".json"
    rows: list[PairRow] = [*(_published(path, protocol) if published else read_rows(path, "references").values())]
    for row in rows:
        if not (isinstance(row["references"], list) and all(isinstance(text, str) for text in row["references"])):
            raise ValueError(f"{path}: 'references' of {row['pair_id']!r} must be a list of strings, "
                             f"got {row['references']!r}")
    if not rows:
        raise ValueError(f"{path}: no line; one per pair is needed")
    check_counts(protocol, rows)
    return rows


def _published(path: Path, protocol: Protocol) -> list[PairRow]:
    """Entries with the same id are one pair; a pair without words keeps one empty reference, as papers score it."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    merged: dict[str, list[str]] = {}
    for number, entry in enumerate(entries if isinstance(entries, list) else [entries]):
        if not isinstance(entry, dict) or {protocol.id_key, protocol.text_key} - entry.keys():
            raise ValueError(f"{path} entry {number}: needs '{protocol.id_key}' and '{protocol.text_key}', as the "
                             f"annotations of {protocol.source} have")
        texts = merged.setdefault(str(entry[protocol.id_key]), [])
        texts += [text for text in entry[protocol.text_key] if text.strip()]
    return [{"pair_id": key, "references": texts or [""]} for key, texts in merged.items()]


def score_files(predictions: Sequence[Path], references: Path, *, key: str | None = None,
                metrics: Sequence[str] = METRICS) -> dict[str, Any]:
    """The metrics of a JSONL file of predictions with their 95 % "intervals", `num_pairs`, the protocol's name and the
    digest of the references. Of several files, one for each seed of a system: the means, the standard deviation of
    one run as "spread", and `num_runs`.

    Lines are {"pair_id", "prediction"} and {"pair_id", "references": [...]}; see read_benchmark for other references.
    Raises ValueError naming file and line, or the ids that only one file has.
    """
    runs, groups, facts = _score_all(predictions, references, key, metrics)
    if len(runs) == 1:
        return {**runs[0].corpus, "intervals": intervals(runs[0], groups), **facts}
    values = {name: [run.corpus[name] for run in runs] for name in metrics}
    return {**{name: statistics.fmean(each) for name, each in values.items()},
            "spread": {name: statistics.stdev(each) for name, each in values.items()}, "num_runs": len(runs), **facts}


def compare_files(first: Path, second: Path, references: Path, *, key: str | None = None) -> dict[str, Any]:
    """Two JSONL files of predictions against one of references, whose pairs are drawn by `group_id` where they have it.

    Raises as score_files.
    """
    (ours, theirs), groups, facts = _score_all([first, second], references, key, METRICS)
    comparisons = compare(ours, theirs, groups)
    return {**{name: asdict(comparison) for name, comparison in comparisons.items()}, **facts, "resamples": RESAMPLES}


def _score_all(predictions: Sequence[Path], references: Path, key: str | None,
               metrics: Sequence[str]) -> tuple[list[Scores], list[str], dict[str, Any]]:
    """The scores of each file on the pairs of the protocol, the group of each pair, and the facts that results share.

    Raises ValueError if there is no protocol of this key.
    """
    if key and key not in PROTOCOLS:
        raise ValueError(f"--protocol {key} is not known; known are {', '.join(PROTOCOLS)}")
    protocol = PROTOCOLS[key] if key else protocol_of("")
    rows = read_benchmark(references, protocol)
    texts = {row["pair_id"]: texts_of(row, joined=protocol.joined) for row in rows}
    chosen = chosen_rows(protocol, rows)
    groups = [str(rows[place].get("group_id", rows[place]["pair_id"])) for place in chosen]
    scores = [restricted(score(read_predictions(path), texts, metrics=metrics), chosen) for path in predictions]
    return scores, groups, {"num_pairs": len(chosen), "num_groups": len(set(groups)), "protocol": protocol.name,
                            "references": references_digest(texts)}
