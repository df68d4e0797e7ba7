"""Stage `score` compares captions with references and writes the scores.

data/metrics.json has the scores of the `test` split, data/gate.json those of the `gate` split, and data/scored the
scores of each pair.
"""

import json
from collections.abc import Callable, Container, Iterator
from functools import cache
from typing import Any

from rich.console import Console
from rich.table import Table

from onediff.data.record import Record, read_records, read_table
from onediff.eval.analysis.wording import own_question_scores, paraphrase_spread
from onediff.eval.caption_files import read_predictions
from onediff.eval.evaluation import evaluate
from onediff.eval.floors import NearestPairs
from onediff.eval.metrics.catalog import BEHAVIOUR, METRICS
from onediff.eval.metrics.compute import start
from onediff.eval.metrics.words import Predictions
from onediff.eval.protocols import check_counts, protocol_of, protocols_of, rounded
from onediff.eval.questions import GENERATED
from onediff.files import new_folder, read_json, read_jsonl, write_json
from onediff.paths import CAPTIONS, CARD, DIFFCAP, GATE, OWN_QUESTION, PARAPHRASED, SCORED
from onediff.paths import METRICS as METRICS_FILE
from onediff.stages.command import run

OUTPUTS = {"test": METRICS_FILE, "gate": GATE}
FLOORS = {"constant": "best constant", "random_train": "random training", "nearest_train": "nearest training pair"}


def score() -> None:
    """Score the captions of the splits `test` and `gate`; write the scores, and print them with those of baselines."""
    start()  # METEOR's Java program loads its tables while this process reads the dataset.
    train = read_table(DIFFCAP, "train-*.parquet")
    card = read_json(CARD)
    auc, incomplete = card.get("pixel_difference_auc", {}), card.get("incomplete", {})
    scores, pairs = {}, {}

    @cache
    def nearest_of(source: str) -> NearestPairs | None:
        chosen = [row for row in train if row["source"] == source]
        return NearestPairs(chosen, _records("train", source)) if chosen else None

    for split, output in OUTPUTS.items():
        rows = read_table(DIFFCAP, f"{split}-*.parquet")
        sources = {row["source"] for row in rows}
        results = _score_split(split, rows, train=train, nearest_of=nearest_of,
                               official=sources - incomplete.keys() if split == "test" else ())
        for name, result in results.items():
            source = name.split("/")[0]
            if auc.get(source) is not None:  # The AUC is undefined (None) for a source without unchanged pairs.
                result["pixel_difference_auc"] = auc[source]
            if source in incomplete:
                result["incomplete"] = incomplete[source]
        for name in sorted(incomplete.keys() - sources):
            print(f"{name}: has no pair in the split {split}, so it gets no score: {json.dumps(incomplete[name])}")
        pairs[split] = {name: result.pop("pairs") for name, result in results.items()}
        scores[output] = results
        _show(f"{split} split, {output}", results)
    with new_folder(SCORED) as folder:
        for split in OUTPUTS:
            write_json(folder / f"{split}.json", rounded(pairs[split]))
    for output, results in scores.items():
        write_json(output, rounded(results), indent=1, sort_keys=True)


def _score_split(split: str, rows: list[dict[str, Any]], *, train: list[dict[str, Any]],
                 nearest_of: Callable[[str], NearestPairs | None], official: Container[str]) -> dict[str, Any]:
    """Return a dict from the name of each benchmark of a split to its scores.

    `nearest_of` returns the search among the training pairs of a source, or None if there are none. `official` holds
    the sources that must have exactly the pairs of their published test split.
    """
    results: dict[str, Any] = {}
    for source in dict.fromkeys(row["source"] for row in rows):
        predictions = read_predictions(CAPTIONS / f"{split}/{source}.jsonl")
        chosen = [row for row in rows if row["source"] == source]
        for protocol in protocols_of(source).values() if source in official else ():
            check_counts(protocol, chosen)
        floor_source = protocol_of(source).train_source
        train_rows, find = [row for row in train if row["source"] == floor_source], nearest_of(floor_source)
        tables = evaluate(source, predictions, chosen, train=train_rows,
                          nearest=find(_records(split, source)) if find else None)
        question = read_jsonl(CAPTIONS / f"{split}/{source}.jsonl")[0]["question"]
        extra = _other_questions(source, predictions, chosen) if split == "test" and source in GENERATED else {}
        results |= {name: {**table, "question": question, **extra} for name, table in tables.items()}
    return results


def _other_questions(source: str, predictions: Predictions, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the scores for the own question of each record, and the spread of the figures over the paraphrases.

    `predictions` are the captions that answer the default question.
    """
    own = read_predictions(OWN_QUESTION / f"{source}.jsonl")
    paraphrased = PARAPHRASED / f"{source}.jsonl"
    lines = read_jsonl(paraphrased) if paraphrased.exists() else []  # absent if caption.num_paraphrased is 0
    return {"own_question": own_question_scores(source, own, rows),
            "paraphrases": paraphrase_spread(source, lines, predictions, rows)}


def _records(split: str, source: str) -> Iterator[Record]:
    return (record for record in read_records(DIFFCAP, f"{split}-*.parquet") if record.source == source)


def _show(title: str, results: dict[str, Any]) -> None:
    """Print a table of the scores of all benchmarks. The scores are multiplied by 100, as in papers."""
    table = Table("benchmark", "captions", *METRICS, title=f"{title} (times 100)", title_justify="left")
    for name, result in results.items():
        table.add_row(name, f"{result['num_pairs']} predictions", *_times_100(result))
        table.add_row("", "95 % interval", *("{:.1f}-{:.1f}".format(*(100 * bound for bound in bounds))
                                             for bounds in result["score_intervals"].values()))
        for floor, scores in result["floor"].items():
            table.add_row("", FLOORS.get(floor, floor), *_times_100(scores))
        if result["leave_one_out"]:
            table.add_row("", f"a reference of {result['leave_one_out']['num_pairs']}",
                          *_times_100(result["leave_one_out"]))
        table.add_section()
    # If stdout is a pipe, rich would otherwise wrap the table at 80 columns.
    console = Console(width=max(120, Console().width))
    console.print(table)
    for name, result in results.items():
        shown = [f"{key} {result[key]:.3f} [{result['intervals'][key][0]:.3f}, {result['intervals'][key][1]:.3f}]"
                 for key in BEHAVIOUR if key in result]
        if "oracle_ratio" in result.get("changed", {}):
            shown.append("changed CIDEr / oracle {CIDEr:.2f} / {oracle_CIDEr:.2f} = {oracle_ratio:.3f}".format(
                **result["changed"]))
        if "incomplete" in result:
            shown.append(f"INCOMPLETE, not comparable with published scores: {json.dumps(result['incomplete'])}")
        if "pixel_difference_auc" in result:
            shown.append(f"pixel_difference_auc {result['pixel_difference_auc']:.3f}")
        console.print(f"{name}: " + " · ".join(shown), highlight=False, markup=False)
        _show_questions(console, name, result)


def _show_questions(console: Console, name: str, result: dict[str, Any]) -> None:
    """Print the figures for the own question of each record, and their range over the paraphrases of the question."""
    own, spread = result.get("own_question", {}), result.get("paraphrases", {})
    lines = {"own question": [f"{key} {own[key]:.3f}" for key in BEHAVIOUR if key in own],
             "paraphrases": [f"{key} {spread[key]['mean']:.3f} [{spread[key]['low']:.3f}, {spread[key]['high']:.3f}]"
                             for key in BEHAVIOUR if key in spread]}
    for label, shown in lines.items():
        if shown:
            console.print(f"{name}, {label}: " + " · ".join(shown), highlight=False, markup=False)


def _times_100(scores: dict[str, Any]) -> list[str]:
    return [f"{100 * scores[metric]:.1f}" for metric in METRICS]


if __name__ == "__main__":
    run(score)
