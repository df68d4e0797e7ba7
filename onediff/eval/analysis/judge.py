"""Let a language model judge captions: does a caption state the change in the references, and does it invent a change?

The verdicts are only reported; they do not decide about promotion. `agreement` measures how reliable the judge is on
generated data, where the grammar knows whether a caption is true. The judge calls a caption true if the caption states
the change (answer "yes", not "partly") and invents none. An answer in any other form is counted as an error.
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
from onediff.eval.caption_files import read_predictions
from onediff.eval.metrics.ngrams import Numbers
from onediff.eval.metrics.words import Predictions, References, check_keys
from onediff.eval.protocols import PROTOCOLS, PairRow, protocol_of, read_benchmark
from onediff.paths import DIFFCAP

ANSWERS = answers_path("judge", "verdicts")
VALUES = {"states": ("yes", "partly", "no"), "invents": ("yes", "no")}


@dataclass(frozen=True)
class Verdict:
    """The judge's verdict on one caption.

    `states` is the answer to "does the caption state the true change?", `invents` to "does it invent a change?". If
    `status` is not "ok", there is no verdict: both answers are empty, and `reason` says why. `key` identifies the
    stored answer of the judge in the file ANSWERS.
    """

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
    """Let the judge, a language model, judge a JSONL file of predictions, and return the summary and the verdicts.

    `references` is a JSONL file with the references of the same pairs. `known` is the name of a benchmark with a
    grammar, whose pairs are in the DiffCap files of the folder `shards`. If `known` is given, the summary also contains
    the agreement of the judge with the grammar, and `references` may be None; then the references of this benchmark are
    used.

    Raises ValueError with file and line for bad input, and all errors of `judge` and `known_truths`.
    """
    captions = read_predictions(predictions)
    rows: list[PairRow] = []
    if known:
        splits = [name for name in ("test", "gate", "val") if any(shards.glob(f"{name}-*.parquet"))] or ["test"]
        rows = [row for name in splits for row in read_table(shards, f"{name}-*.parquet") if row["source"] == known]
    truths = known_truths(captions, rows, known) if known else {}
    judged_rows = [row for row in rows if row["pair_id"] in captions]
    if references:  # The protocol of an unknown source does not check the number of pairs.
        judged_rows = read_benchmark(references, protocol_of("references"))
    elif not known:
        raise ValueError("--references is needed: a JSONL file of lines with 'pair_id' and 'references'; "
                         "for generated data, --truth BENCHMARK can be given instead")
    texts = {row["pair_id"]: list(row["references"]) for row in judged_rows}
    check_keys(captions, texts, where=f"{predictions}: ")
    groups = {row["pair_id"]: str(row.get("group_id", row["pair_id"])) for row in [*judged_rows, *rows]}
    verdicts = judge(captions, texts, settings, runtime)
    result = summary(verdicts, groups)
    return result | ({"agreement": agreement(verdicts, truths, groups)} if known else {}), verdicts


def judge(predictions: Predictions, references: References, settings: Judge, runtime: Runtime) -> list[Verdict]:
    """Ask the judge about the caption of each pair, and return the verdicts in the order of the references.

    Answers that are stored in the file ANSWERS are used again, because each request costs money. Raises ValueError if
    predictions and references have different pair_ids, and all errors of `writer.asking.ask`: ValueError,
    ConnectionError, InterruptedError and OSError.
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
    """Return how often the judge gave each answer, as a share of the captions, and the number of errors.

    Each share (0 to 1) has a 95 % interval from a bootstrap over groups of pairs. `groups` maps each pair_id to the
    group of the pair (a scene or photograph).
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


def known_truths(predictions: Predictions, rows: Iterable[PairRow], benchmark: str) -> dict[str, bool]:
    """Return whether each predicted caption is true according to the grammar, as {pair_id: whether it is true}.

    The pairs must be generated, so that the true change is known. For `edits`, a caption is true if it names the right
    operation. Raises ValueError if the benchmark has no grammar, or if `rows` do not contain all pairs of the
    predictions.
    """
    grammar = PROTOCOLS[benchmark].grammar if benchmark in PROTOCOLS else None
    if grammar is None:
        known = ", ".join(name for name, protocol in PROTOCOLS.items() if protocol.grammar)
        raise ValueError(f"--truth {benchmark}: must be a benchmark with a grammar, because the true change is known "
                         f"only for generated pairs; use one of {known}")
    truths = {row["pair_id"]: all(GRAMMARS[grammar].checks(predictions[row["pair_id"]], row).values())
              for row in rows if row["pair_id"] in predictions}
    lacking = [pair_id for pair_id in predictions if pair_id not in truths]
    if lacking:
        raise ValueError(f"--truth {benchmark}: all pairs of the predictions must be in the DiffCap files, but "
                         f"{len(lacking):,} are missing (first: {lacking[0]}); give the folder that contains them "
                         "with --shards")
    return truths


def agreement(verdicts: Iterable[Verdict], truths: Mapping[str, bool], groups: Mapping[str, str], *,
              resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Any]:
    """Return how well the judge agrees with the grammar: accuracy and Cohen's kappa, with 95 % intervals.

    `truths` says whether each caption is true according to the grammar. Captions without a verdict are left out; only
    accuracy_of_all counts them as wrong. "counts" has four numbers; for example, "true_false" is the number of captions
    that the judge calls true and the grammar calls false. Kappa (Cohen, 1960) is None if judge and grammar both call
    all captions true, or both call all captions false. The bootstrap for the intervals draws groups of pairs.
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
    """Return the accuracy of each 2 x 2 table of counts: the share of the counts that lie on the diagonal.

    `counts` is (..., 2, 2), the result is (...).
    """
    return np.asarray(np.trace(counts, axis1=-2, axis2=-1) / counts.sum((-2, -1)))


def kappa(counts: Numbers) -> Numbers:
    """Return Cohen's kappa, -1 to 1, of each 2 x 2 table of counts.

    `counts` is (..., 2, 2), the result is (...). Kappa is NaN for a table if the agreement expected by chance is 1.
    """
    total = counts.sum((-2, -1))
    chance = (counts.sum(-1) * counts.sum(-2)).sum(-1) / total**2
    return np.divide(accuracy(counts) - chance, 1 - chance, out=np.full(total.shape, np.nan), where=chance < 1)


def as_text(result: Mapping[str, Any]) -> str:
    """Format the summary that `judge_files` returns as text: a table of the judge's answers, then the agreement.

    The agreement with the grammar is left out if it was not measured.
    """
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
        return ["agreement with the grammar: unknown, because no caption was judged"]
    counts = agreed["counts"]
    lines = [f"captions called true: by the judge {counts['true_true'] + counts['true_false']:,}, by the grammar "
             f"{counts['true_true'] + counts['false_true']:,}, by both {counts['true_true']:,}, by neither "
             f"{counts['false_false']:,}"]
    for name, called in (("accuracy", "accuracy"), ("kappa", "Cohen's kappa")):
        low, high = agreed[f"{name}_interval"]
        lines.append(f"{called:<14} undefined, because all verdicts are equal" if agreed[name] is None else
                     f"{called:<14} {agreed[name]:.3f} [{low:.3f}, {high:.3f}]")
    return [*lines, f"{agreed['num_groups']:,} groups; {agreed['num_errors']:,} errors are left out; counted as wrong, "
                    f"they would give an accuracy of {agreed['accuracy_of_all']:.3f}"]
