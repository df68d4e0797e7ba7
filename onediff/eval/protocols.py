"""Protocols: the versioned rules by which each benchmark is scored. docs/protocols.md explains each rule.

A protocol fixes the pairs, the references and the tokenization. Scores of two different protocols must not be compared,
so tables never show them in the same column.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from onediff.encoding import read_text
from onediff.eval.caption_files import check_texts, is_coco, read_predictions, read_references
from onediff.eval.metrics.catalog import METRICS
from onediff.eval.metrics.compute import Scores, score
from onediff.eval.metrics.words import References, check_keys
from onediff.eval.resample import RESAMPLES, compare, intervals, restricted
from onediff.files import key_of
from onediff.text_files import parse_json

PairRow = Mapping[str, Any]  # one pair: pair_id, references; optional: group_id, change_type, provenance


@dataclass(frozen=True)
class Protocol:
    """The rules by which one benchmark is scored.

    `source`: name of the dataset whose test captions are scored. `train_source`: name of the dataset whose training
    captions the trivial baselines use. `grammar`: name of the grammar that parses the captions, or None if no grammar
    can. `joined`: whether all reference sentences of a pair are joined to one reference. `only`: "changed" or
    "unchanged" if only these pairs are scored; the document frequencies of CIDEr are still counted on all pairs of the
    split.

    `num_pairs`, `num_references`: numbers of pairs and of non-empty references in the official test split; None is not
    checked. `id_key`, `text_key`: keys of the pair id and of the sentences in the published annotation file.
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
    """Return the scoring protocol of each benchmark of a source (dataset), as {key of the benchmark: protocol}.

    A source that is not in PROTOCOLS has one benchmark: all references of the source, scored like COCO captions.
    """
    known = {key: protocol for key, protocol in PROTOCOLS.items() if protocol.source == source}
    return known or {source: Protocol("coco-caption/v1", source, source)}


def protocol_of(source: str) -> Protocol:
    """Return the first scoring protocol of a source (dataset).

    Use it for `grammar` and `train_source` only, because these are equal in all protocols of a source.
    """
    return next(iter(protocols_of(source).values()))


def texts_of(row: PairRow, *, joined: bool) -> list[str]:
    """Return the references of a pair. If `joined` is True, all references are joined to a single text in the list."""
    return [" ".join(text for text in row["references"] if text.strip())] if joined else list(row["references"])


def chosen_rows(protocol: Protocol, rows: Sequence[PairRow]) -> list[int]:
    """Return the positions in `rows` of the pairs that the protocol scores.

    Raises ValueError if the protocol scores only changed or only unchanged pairs and a row has no change_type.
    """
    if protocol.only is None:
        return list(range(len(rows)))
    untyped = [row["pair_id"] for row in rows if not row.get("change_type")]
    if untyped:
        raise ValueError(f"{protocol.name} scores only {protocol.only} pairs, so each reference line must have a "
                         f"'change_type' ('none' for unchanged pairs), but pair {untyped[0]} has none; "
                         "'onediff references' writes a file with change types")
    return [place for place, row in enumerate(rows) if (row["change_type"] == "none") == (protocol.only == "unchanged")]


def check_counts(protocol: Protocol, rows: Sequence[PairRow]) -> None:
    """Raise ValueError unless the protocol scores as many of these pairs as its official test split contains.

    The number of non-empty references must also be equal to the official number. A number that the protocol does not
    set is not checked.
    """
    chosen = [rows[place] for place in chosen_rows(protocol, rows)]
    num_references = sum(bool(text.strip()) for row in chosen for text in row["references"])
    for what, official, got in (("pairs", protocol.num_pairs, len(chosen)),
                                ("references", protocol.num_references, num_references)):
        if official not in (None, got):
            raise ValueError(f"{protocol.name} scores the official test split with {official:,} {what}, got "
                             f"{got:,}; give the complete test split, or score without --protocol")


def references_digest(references: References) -> str:
    """Return a digest (hash) of all references of a test set, independent of the order of the pairs.

    Two scores are comparable only if the digests of their references are equal.
    """
    return key_of(references)[:32]


def rounded(value: Any) -> Any:
    """Return a JSON value with all floats rounded to six decimal places.

    Without rounding, score files would differ when only the order of a floating-point sum differs.
    """
    return json.loads(json.dumps(value), parse_float=lambda digits: round(float(digits), 6))


def read_benchmark(path: Path, protocol: Protocol) -> list[PairRow]:
    """Read the references of a benchmark, and return one row for each pair.

    `path` is a file of references in JSON Lines or in the format of COCO, or the annotation file (.json) that the
    authors of the benchmark published. Raises ValueError with file and line for a wrong line or entry, and if the
    number of pairs or of references differs from the official test split.
    """
    rows: list[PairRow] | None = None
    if protocol.id_key is not None and path.suffix == ".json":
        value = parse_json(read_text(path, "a JSON file"), str(path))
        rows = None if is_coco(value) else _published(value, path, protocol)
    rows = [*read_references(path)] if rows is None else rows
    check_counts(protocol, rows)
    return rows


def _published(value: Any, path: Path, protocol: Protocol) -> list[PairRow]:
    """Return one row for each pair of the published annotation file of a benchmark, whose content is `value`.

    All entries of the file with the same id belong to one pair. A pair whose sentences are all empty keeps one empty
    reference, because papers include such pairs in their scores.
    """
    merged: dict[str, list[str]] = {}
    for number, entry in enumerate(value if isinstance(value, list) else [value]):
        if not isinstance(entry, dict) or {protocol.id_key, protocol.text_key} - entry.keys():
            raise ValueError(f"{path} entry {number}: must have '{protocol.id_key}' and '{protocol.text_key}', like "
                             f"the published annotations of {protocol.source}")
        check_texts(entry[protocol.text_key], f"'{protocol.text_key}'", f"{path} entry {number}")
        texts = merged.setdefault(str(entry[protocol.id_key]), [])
        texts += [text for text in entry[protocol.text_key] if text.strip()]
    return [{"pair_id": key, "references": texts or [""]} for key, texts in merged.items()]


def score_files(predictions: Sequence[Path], references: Path, *, key: str | None = None,
                metrics: Sequence[str] = METRICS) -> dict[str, Any]:
    """Score files of predictions, and return the score of each metric and facts about the test set.

    The facts are num_pairs, num_groups, the name of the protocol, and the digest of the references. For one file,
    "intervals" has the 95 % interval of each score. Several files must be predictions of one system with different
    training seeds: then the scores are means over the files, "spread" has the standard deviation between the files, and
    "num_runs" is the number of files.

    `caption_files` describes the formats of predictions, and `read_benchmark` those of references. `key` is a key of
    PROTOCOLS. Raises ValueError with file and line for a wrong line, and with file and pair_ids if predictions and
    references are not of the same pairs.
    """
    runs, groups, facts = _score_all(predictions, references, key, metrics)
    if len(runs) == 1:
        return {**runs[0].corpus, "intervals": intervals(runs[0], groups), **facts}
    values = {name: [run.corpus[name] for run in runs] for name in metrics}
    return {**{name: statistics.fmean(each) for name, each in values.items()},
            "spread": {name: statistics.stdev(each) for name, each in values.items()}, "num_runs": len(runs), **facts}


def compare_files(first: Path, second: Path, references: Path, *, key: str | None = None) -> dict[str, Any]:
    """Compare the predictions of two files on the same references with a paired bootstrap.

    The result has a Comparison, as a dict, for each metric. The bootstrap draws groups of pairs with the same
    `group_id` in the references, or single pairs if there is no `group_id`. Raises ValueError as `score_files` does.
    """
    (ours, theirs), groups, facts = _score_all([first, second], references, key, METRICS)
    comparisons = compare(ours, theirs, groups)
    return {**{name: asdict(comparison) for name, comparison in comparisons.items()}, **facts, "resamples": RESAMPLES}


def _score_all(predictions: Sequence[Path], references: Path, key: str | None,
               metrics: Sequence[str]) -> tuple[list[Scores], list[str], dict[str, Any]]:
    """Score each file of predictions on the pairs that the protocol scores.

    Returns the scores of each file, the group of each scored pair, and a dict with the number of pairs, the number of
    groups, the name of the protocol, and the digest of the references. Raises ValueError if `key` is not a key of
    PROTOCOLS.
    """
    if key and key not in PROTOCOLS:
        raise ValueError(f"--protocol {key}: must be one of {', '.join(PROTOCOLS)}")
    protocol = PROTOCOLS[key] if key else protocol_of("")
    rows = read_benchmark(references, protocol)
    texts = {row["pair_id"]: texts_of(row, joined=protocol.joined) for row in rows}
    chosen = chosen_rows(protocol, rows)
    groups = [str(rows[place].get("group_id", rows[place]["pair_id"])) for place in chosen]
    captions = [read_predictions(path) for path in predictions]
    for path, system in zip(predictions, captions, strict=True):
        check_keys(system, texts, where=f"{path}: ")
    scores = [restricted(score(system, texts, metrics=metrics), chosen) for system in captions]
    return scores, groups, {"num_pairs": len(chosen), "num_groups": len(set(groups)), "protocol": protocol.name,
                            "references": references_digest(texts)}
