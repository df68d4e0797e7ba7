"""The main scores of the last pipeline run as a table for a terminal, beside the range over several seeds."""

import json
from collections.abc import Mapping
from typing import Any

from onediff.eval.unscored import unscored
from onediff.files import read_json
from onediff.git import committed
from onediff.paths import CARD, DVC_LOCK, METRICS, SEEDS
from onediff.repro.lock import parse_dvc_lock, read_dvc_lock

# For each column title of the table: metrics, of which a cell shows the first one that the benchmark has.
COLUMNS = {"CIDEr": ("CIDEr",), "METEOR": ("METEOR",),
           "kind of change right": ("change_type_accuracy", "operation_accuracy"),
           "false alarms": ("false_alarm_rate",)}


def score_table() -> str:
    """Return the scores in data/metrics.json as a text table with one row for each benchmark of the test split.

    If the checked-out git commit contains scores that were produced with equal parameters, brackets compare with it:
    they show the lowest and the highest score of several seeds if docs/seeds.json has them, as in the README, and
    otherwise the committed score. The table is at most 100 characters wide, and a line for each source without a score
    follows it. Raises FileNotFoundError if data/metrics.json does not exist.
    """
    present = read_json(METRICS, "run 'dvc repro score' to create it")
    earlier = _committed_scores()
    ranges = read_json(SEEDS)["figures"] if earlier and SEEDS.exists() else {}
    note = ("in brackets the range over seeds, as in the README" if ranges else
            "in brackets those of the git commit" if earlier else
            "the git commit has no scores with these parameters to compare with")
    rows = [["", *COLUMNS]]
    for benchmark, scores in present.items():
        committed_scores = earlier.get(benchmark, {})
        rows.append([benchmark, *(_cell(benchmark, scores, committed_scores, ranges, names)
                                  for names in COLUMNS.values())])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    notes = unscored(read_json(CARD)) if CARD.exists() else []
    return "\n".join(["\n  ".join([f"Scores of the test split, times 100; {note}:", *lines]), *notes])


def _committed_scores() -> dict[str, Any]:
    """Return data/metrics.json of the checked-out git commit, or {} if it was produced with other parameters."""
    metrics, locked = committed(METRICS), committed(DVC_LOCK)
    if not metrics or not locked or not DVC_LOCK.exists():
        return {}
    parameters = [{name: stage.params for name, stage in stages.items()}
                  for stages in (parse_dvc_lock(locked, DVC_LOCK), read_dvc_lock())]
    return json.loads(metrics) if parameters[0] == parameters[1] else {}


def _cell(benchmark: str, scores: Mapping[str, Any], earlier: Mapping[str, Any], ranges: Mapping[str, Any],
          names: tuple[str, ...]) -> str:
    """Return the first of the figures `names` that the benchmark has, and in brackets what it is compared with."""
    name = next((name for name in names if name in scores), None)
    if name is None:
        return "-"
    spread = ranges.get(f"{benchmark}.{name}")
    compared = [spread["low"], spread["high"]] if spread else [earlier[name]] if name in earlier else []
    brackets = "-".join(f"{100 * value:.1f}" for value in compared)
    return f"{100 * scores[name]:.1f}" + (f" ({brackets})" if brackets else "")
