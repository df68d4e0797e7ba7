"""A language model judges captions by their references: is the change stated, is any invented? It decides nothing.

What a judge is worth shows where the truth is known: `agreement` sets its verdicts beside those of the grammar that
made the references. Both then answer one question, whether the caption is true: for the judge, it states the change
(yes, not partly) and invents none. What it answers in another form is an error, counted and left out, never guessed.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onediff.config import Judge, Runtime, Writer
from onediff.data.record import read_table
from onediff.data.sources.tables import aligned
from onediff.data.writer.answers import answers_path, read_answers
from onediff.data.writer.answers import parse as parse_answer
from onediff.data.writer.asking import ask
from onediff.data.writer.request import judgement_of_caption
from onediff.eval.analysis.behaviour import GRAMMARS, RESAMPLES, interval
from onediff.eval.metrics.ngrams import Numbers
from onediff.eval.metrics.words import Predictions, References, check_keys
from onediff.eval.protocols import PROTOCOLS, PairRow, protocol_of, read_benchmark, read_predictions
from onediff.paths import DIFFCAP

ANSWERS = answers_path("judge", "verdicts")
VALUES = {"states": ("yes", "partly", "no"), "invents": ("yes", "no")}


@dataclass(frozen=True)
class Verdict:
    """`states` and `invents` are empty unless status is ok; `reason` says then why, `key` names the kept answer."""

    pair_id: str
    prediction: str
    references: list[str]
    status: str
    reason: str
    states: str
    invents: str
    model: str
    key: str

    @property
    def is_true(self) -> bool:
        return (self.states, self.invents) == ("yes", "no")


def judge_files(predictions: Path, references: Path | None, settings: Judge, runtime: Runtime, *,
                known: str | None = None, shards: Path = DIFFCAP) -> tuple[dict[str, Any], list[Verdict]]:
    """The summary and the verdicts on JSONL files; beside the truth, where `known` names a benchmark of the shards
    whose grammar tells it, and whose references serve where no others are given.

    Raises ValueError naming file and line, or as `judge` and `known_truths` do.
    """
    captions = read_predictions(predictions)
    if not captions:
        raise ValueError(f"{predictions}: no line; one per pair is needed")
    rows: list[PairRow] = []
    if known:
        splits = [name for name in ("test", "gate", "val") if any(shards.glob(f"{name}-*.parquet"))] or ["test"]
        rows = [row for name in splits for row in read_table(shards, f"{name}-*.parquet") if row["source"] == known]
    truths = known_truths(captions, rows, known) if known else {}
    judged_rows = [row for row in rows if row["pair_id"] in captions]
    if references:  # of no published set, so no count is official
        judged_rows = read_benchmark(references, protocol_of("references"))
    elif not known:
        raise ValueError("--references is needed: JSONL lines of pair_id and references; or --truth, of generated data")
    texts = {row["pair_id"]: list(row["references"]) for row in judged_rows}
    groups = {row["pair_id"]: str(row.get("group_id", row["pair_id"])) for row in [*judged_rows, *rows]}
    verdicts = judge(captions, texts, settings, runtime)
    result = summary(verdicts, groups)
    return result | ({"agreement": agreement(verdicts, truths, groups)} if known else {}), verdicts


def judge(predictions: Predictions, references: References, settings: Judge, runtime: Runtime) -> list[Verdict]:
    """A verdict for each pair, in the order of the references; only what ANSWERS does not hold is asked and paid for.

    Raises ValueError if the keys differ; as the writer does ValueError, ConnectionError, InterruptedError, OSError.
    """
    check_keys(predictions, references)
    writer = Writer(mode="text", **settings.model_dump())
    requests = {pair_id: judgement_of_caption(pair_id, writer, caption=predictions[pair_id], references=texts)
                for pair_id, texts in references.items()}
    ask(requests.values(), ANSWERS, runtime)
    answers = read_answers(ANSWERS)
    verdicts = []
    for pair_id, request in requests.items():
        answer = answers[request.key]
        judgement = parse_answer(answer.text, "judgement") if answer.status == "ok" else {"states": "", "invents": ""}
        verdicts.append(Verdict(pair_id, predictions[pair_id], list(references[pair_id]), answer.status, answer.reason,
                                judgement["states"], judgement["invents"], answer.model, answer.key))
    return verdicts


def summary(verdicts: Sequence[Verdict], groups: Mapping[str, str]) -> dict[str, Any]:
    """Shares of the judged captions, 0 to 1, with 95 % intervals, and what could not be used, by status.

    `groups`: pair_id -> group; pairs of one scene or photograph are drawn together.
    """
    judged = [verdict for verdict in verdicts if verdict.status == "ok"]
    errors = Counter(verdict.status for verdict in verdicts if verdict.status != "ok")
    result: dict[str, Any] = {"num_pairs": len(verdicts), "num_judged": len(judged), "errors": dict(errors)}
    for name, values in VALUES.items() if judged else ():
        result[name] = {}
        for value in values:
            outcomes = [(groups[verdict.pair_id], getattr(verdict, name) == value) for verdict in judged]
            count = sum(equal for _, equal in outcomes)
            result[name][value] = {"count": count, "share": count / len(judged), "interval": interval(outcomes)}
    return result


# --- what the judge is worth ------------------------------------------------------------------------------------------


def known_truths(predictions: Predictions, rows: Iterable[PairRow], benchmark: str) -> dict[str, bool]:
    """pair_id -> whether the caption is true, by the grammar of generated data (of edits: whether the operation is).

    Raises ValueError if no grammar reads the benchmark's captions, or rows lack pairs of the predictions.
    """
    grammar = PROTOCOLS[benchmark].grammar if benchmark in PROTOCOLS else None
    if grammar is None:
        known = ", ".join(name for name, protocol in PROTOCOLS.items() if protocol.grammar)
        raise ValueError(f"--truth {benchmark}: no grammar reads its captions, so their truth is not known; it is for "
                         f"{known}")
    truths = {row["pair_id"]: all(GRAMMARS[grammar].checks(predictions[row["pair_id"]], row).values())
              for row in rows if row["pair_id"] in predictions}
    lacking = [pair_id for pair_id in predictions if pair_id not in truths]
    if lacking:
        raise ValueError(f"--truth {benchmark}: {len(lacking):,} pairs of the predictions are none of its pairs in the "
                         f"shards (first: {lacking[0]}); name their folder with --shards")
    return truths


def agreement(verdicts: Iterable[Verdict], truths: Mapping[str, bool], groups: Mapping[str, str], *,
              resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Any]:
    """Accuracy and Cohen's kappa of the judge against the truth, over what it judged, with 95 % intervals that draw
    whole groups; the four counts, "judge_grammar"; accuracy_of_all, where an error is wrong.

    Kappa is None where both call all captions true, or all false. Cohen, 1960.
    """
    table = list(verdicts)
    judged = [verdict for verdict in table if verdict.status == "ok"]
    places = {group: place for place, group in enumerate(dict.fromkeys(groups[verdict.pair_id] for verdict in judged))}
    counts = np.zeros((len(places), 2, 2))
    for verdict in judged:
        counts[places[groups[verdict.pair_id]], int(verdict.is_true), int(truths[verdict.pair_id])] += 1
    total = counts.sum(0)
    result: dict[str, Any] = {
        "num_judged": len(judged), "num_errors": len(table) - len(judged), "num_groups": len(places),
        "counts": {f"{verdict}_{truth}": int(total[a, b]) for a, verdict in enumerate(("false", "true"))
                   for b, truth in enumerate(("false", "true"))}}
    if not judged:
        return result
    drawn = np.random.default_rng(seed).multinomial(len(places), np.full(len(places), 1 / len(places)), size=resamples)
    sums = np.einsum("rg,gab->rab", drawn, counts)
    for name, measure in (("accuracy", accuracy), ("kappa", kappa)):
        value, drawn_values = float(measure(total)), measure(sums)
        known = drawn_values[~np.isnan(drawn_values)]
        bounds = [float(bound) for bound in np.quantile(known, (0.025, 0.975))] if len(known) else [None, None]
        result |= {name: None if np.isnan(value) else value, f"{name}_interval": bounds}
    return result | {"accuracy_of_all": float(total[0, 0] + total[1, 1]) / len(table)}


def accuracy(counts: Numbers) -> Numbers:
    """counts (..., 2, 2) -> share on the diagonal (...)."""
    return np.asarray(np.trace(counts, axis1=-2, axis2=-1) / counts.sum((-2, -1)))


def kappa(counts: Numbers) -> Numbers:
    """counts (..., 2, 2) -> Cohen's kappa (...), -1 to 1; NaN where chance alone agrees always."""
    total = counts.sum((-2, -1))
    chance = (counts.sum(-1) * counts.sum(-2)).sum(-1) / total**2
    return np.divide(accuracy(counts) - chance, 1 - chance, out=np.full(total.shape, np.nan), where=chance < 1)


def as_text(result: Mapping[str, Any]) -> str:
    """The table of `summary`, and beside it `agreement` where there is one."""
    rows = [[f"{question}: {value}", f"{share['count']:,}", f"{100 * share['share']:.1f} %",
             "[{:.1f}, {:.1f}]".format(*(100 * bound for bound in share["interval"]))]
            for name, question in (("states", "states the change"), ("invents", "invents one"))
            for value, share in result.get(name, {}).items()]
    errors = "".join(f", {count:,} {status}" for status, count in result["errors"].items())
    lines = [aligned(["", "pairs", "share", "95 %"], rows)] if rows else []
    lines.append(f"{result['num_judged']:,} of {result['num_pairs']:,} captions judged{errors}")
    if "agreement" in result:
        lines += _agreement_text(result["agreement"])
    return "\n".join(lines)


def _agreement_text(agreed: Mapping[str, Any]) -> list[str]:
    if "accuracy" not in agreed:
        return ["agreement with the grammar: unknown, as no caption was judged"]
    counts = agreed["counts"]
    lines = [f"the judge calls {counts['true_true'] + counts['true_false']:,} captions true, the grammar "
             f"{counts['true_true'] + counts['false_true']:,}, both {counts['true_true']:,}, neither "
             f"{counts['false_false']:,}"]
    for name, called in (("accuracy", "accuracy"), ("kappa", "Cohen's kappa")):
        low, high = agreed[f"{name}_interval"]
        lines.append(f"{called:<14} undefined: all verdicts are alike" if agreed[name] is None else
                     f"{called:<14} {agreed[name]:.3f} [{low:.3f}, {high:.3f}]")
    return [*lines, f"{agreed['num_groups']:,} groups; {agreed['num_errors']:,} errors left out, as wrong ones the "
                    f"accuracy would be {agreed['accuracy_of_all']:.3f}"]
