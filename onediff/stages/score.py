"""Stage `score`: captions and references to data/metrics.json (split test) and data/gate.json (split gate)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from onediff.data.record import read_table
from onediff.eval.metrics import METRICS, read_predictions, start
from onediff.eval.protocols import evaluate, protocol_of
from onediff.stages import run

OUTPUTS = {"test": Path("data/metrics.json"), "gate": Path("data/gate.json")}
BEHAVIOUR = ("change_found_rate", "change_type_accuracy", "changed_object_accuracy", "change_accuracy",
             "false_alarm_rate", "swap_consistency", "operation_accuracy")

FLOORS = {"constant": "best constant", "random_train": "random training"}


def score() -> None:
    """Writes both files, the same captions the same bytes, and prints the scores beside their floors."""
    folder = Path("data/diffcap")
    start()  # METEOR loads its tables while the rows are read
    train = read_table(folder, "train-*.parquet")
    card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    auc, incomplete = card.get("pixel_difference_auc", {}), card.get("incomplete", {})
    for split, output in OUTPUTS.items():
        rows = read_table(folder, f"{split}-*.parquet")
        results = _score_split(split, rows, train=train)
        for name in results:
            if auc.get(name) is not None:  # None: the source has no unchanged pairs
                results[name]["pixel_difference_auc"] = auc[name]
            if name in incomplete:
                results[name]["incomplete"] = incomplete[name]
        for name in sorted(incomplete.keys() - results.keys()):
            print(f"{name}: no pair in split {split}, so no score: {json.dumps(incomplete[name])}")
        output.write_text(json.dumps(_rounded(results), indent=1, sort_keys=True) + "\n", encoding="utf-8")
        _show(f"{split} split, {output}", results)


def _score_split(split: str, rows: list[dict[str, Any]], *, train: list[dict[str, Any]]) -> dict[str, Any]:
    results = {}
    for benchmark in dict.fromkeys(row["source"] for row in rows):
        predictions = read_predictions(Path(f"data/captions/{split}/{benchmark}.jsonl"))
        source = protocol_of(benchmark).train_source
        captions = [text for row in train if row["source"] == source for text in row["references"]]
        chosen = [row for row in rows if row["source"] == benchmark]
        results[benchmark] = evaluate(benchmark, predictions, chosen, train=captions)
    return results


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return round(value, 6) if isinstance(value, float) else value


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
                 for key in BEHAVIOUR if key in result]
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
