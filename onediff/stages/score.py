"""Stage `score`: captions and references to data/metrics.json (split test) and data/gate.json (split gate), and what
each pair scored to data/scored.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from onediff.data.record import Record, read_records, read_table
from onediff.eval.analysis.behaviour import RATES
from onediff.eval.evaluation import evaluate
from onediff.eval.jsonl import read_predictions, rounded
from onediff.eval.metrics.compute import METRICS, start
from onediff.eval.nearest import nearest_rows
from onediff.eval.protocols import check_counts, protocol_of, protocols_of
from onediff.files import new_folder, write_json
from onediff.stages.command import run

OUTPUTS = {"test": Path("data/metrics.json"), "gate": Path("data/gate.json")}
SCORED = Path("data/scored")
FLOORS = {"constant": "best constant", "random_train": "random training", "nearest_train": "nearest training pair"}


def score() -> None:
    """Writes them, the same captions the same bytes, and prints the scores beside their floors."""
    folder = Path("data/diffcap")
    start()  # METEOR loads its tables while the rows are read
    train = read_table(folder, "train-*.parquet")
    card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    auc, incomplete = card.get("pixel_difference_auc", {}), card.get("incomplete", {})
    scores, pairs = {}, {}
    for split, output in OUTPUTS.items():
        rows = read_table(folder, f"{split}-*.parquet")
        sources = {row["source"] for row in rows}
        results = _score_split(split, rows, train=train,
                               whole=sources - incomplete.keys() if split == "test" else ())
        for name, result in results.items():
            source = name.split("/")[0]
            if auc.get(source) is not None:  # None: the source has no unchanged pairs
                result["pixel_difference_auc"] = auc[source]
            if source in incomplete:
                result["incomplete"] = incomplete[source]
        for name in sorted(incomplete.keys() - sources):
            print(f"{name}: no pair in split {split}, so no score: {json.dumps(incomplete[name])}")
        pairs[split] = {name: result.pop("pairs") for name, result in results.items()}
        scores[output] = results
        _show(f"{split} split, {output}", results)
    with new_folder(SCORED) as folder:
        for split in OUTPUTS:
            write_json(folder / f"{split}.json", rounded(pairs[split]))
    for output, results in scores.items():
        write_json(output, rounded(results), indent=1, sort_keys=True)


def _score_split(split: str, rows: list[dict[str, Any]], *, train: list[dict[str, Any]],
                 whole: Container[str]) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for source in dict.fromkeys(row["source"] for row in rows):
        predictions = read_predictions(Path(f"data/captions/{split}/{source}.jsonl"))
        chosen = [row for row in rows if row["source"] == source]
        for protocol in protocols_of(source).values() if source in whole else ():
            check_counts(protocol, chosen)
        floor_source = protocol_of(source).train_source
        own = [row for row in train if row["source"] == floor_source]
        nearest = nearest_rows(own, _reader({"train": floor_source, split: source}), split) if own else None
        results |= evaluate(source, predictions, chosen, train=own, nearest=nearest)
    return results


def _reader(sources: Mapping[str, str]) -> Callable[[str], Iterator[Record]]:
    return lambda split: (record for record in read_records(Path("data/diffcap"), f"{split}-*.parquet")
                          if record.source == sources[split])


def _show(title: str, results: dict[str, Any]) -> None:
    """Scores times 100, as papers print them."""
    table = Table("benchmark", "captions", *METRICS, title=f"{title} (times 100)", title_justify="left")
    for name, result in results.items():
        rows = {f"{result['num_pairs']} predictions": result, **result["floor"]}
        if result["leave_one_out"]:
            rows[f"a reference of {result['leave_one_out']['num_pairs']}"] = result["leave_one_out"]
        for who, scores in rows.items():
            table.add_row(name if scores is result else "", FLOORS.get(who, who),
                          *(f"{100 * scores[metric]:.1f}" for metric in METRICS), end_section=who == list(rows)[-1])
            if scores is result:
                table.add_row("", "95 % interval", *("{:.1f}-{:.1f}".format(*(100 * bound for bound in bounds))
                                                     for bounds in result["score_intervals"].values()))
    console = Console(width=max(120, Console().width))  # a pipe is as wide as a screen
    console.print(table)
    for name, result in results.items():
        shown = [f"{key} {result[key]:.3f} [{result['intervals'][key][0]:.3f}, {result['intervals'][key][1]:.3f}]"
                 for key in RATES if key in result]
        if "oracle_ratio" in result.get("changed", {}):
            told = "changed CIDEr / oracle {CIDEr:.2f} / {oracle_CIDEr:.2f} = {oracle_ratio:.3f}"
            shown.append(told.format(**result["changed"]))
        if "incomplete" in result:
            shown.append(f"INCOMPLETE, not comparable with published scores: {json.dumps(result['incomplete'])}")
        if "pixel_difference_auc" in result:
            shown.append(f"pixel_difference_auc {result['pixel_difference_auc']:.3f}")
        console.print(f"{name}: " + " · ".join(shown), highlight=False, markup=False)


if __name__ == "__main__":
    run(score)
