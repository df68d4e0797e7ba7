"""Reads the score files of a model and refuses missing keys and values outside their range. Imports no MLflow."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from onediff.eval.metrics.catalog import FIGURE_RANGES, PAIR_METRICS, REQUIRED

LARGEST = sys.float_info.max
ROUNDING = 1e-5  # score files keep six places
_CURE = "'dvc repro' scores again; if the message stays, the stage 'score' has a fault"
_PAIR_KEYS = ("protocol", "references", "pair_id", "group_id", *PAIR_METRICS)


def read_scores(where: str, content: bytes) -> dict[str, Any]:
    """benchmark -> its table, of metrics.json or gate.json. `where`: the file, for messages.

    Raises ValueError with one line per fault: no JSON, no benchmark, a missing key, a figure outside its range.
    """
    tables = _read_mapping(where, content)
    faults = []
    for benchmark, table in tables.items():
        missing = [key for key in REQUIRED if not isinstance(table, dict) or key not in table]
        if missing:
            faults.append(f"{benchmark}: must have {', '.join(missing)}")
        else:
            faults += _wrong_figures(benchmark, "", table)
            if table["num_pairs"] == 0:
                faults.append(f"{benchmark}.num_pairs: must be at least 1, got 0")
    _raise(where, faults)
    return tables


def read_pair_scores(where: str, content: bytes, tables: Mapping[str, Any]) -> None:
    """Checks scored/<split>.json against the tables of the same split: the same benchmarks and numbers of pairs, and
    each corpus score is the mean of the pairs'. Raises ValueError with one line per fault.
    """
    pairs = _read_mapping(where, content)
    faults = [f"{name}: must be a benchmark in both this file and the scores of its split"
              for name in sorted(pairs.keys() ^ tables.keys())]
    for name in pairs.keys() & tables.keys():
        faults += [f"{name}{fault}" for fault in _wrong_pairs(pairs[name], tables[name])]
    _raise(where, sorted(faults))


def in_range(name: str, value: object) -> bool:
    """Whether the value is a number in the range of the figure of this name. True and strings are not numbers."""
    low, high = FIGURE_RANGES.get(name, (-LARGEST, LARGEST))
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def _read_mapping(where: str, content: bytes) -> dict[str, Any]:
    try:
        values = json.loads(content.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_number)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise ValueError(f"{where}: not valid JSON ({error}); {_CURE}") from None
    except RecursionError:
        raise ValueError(f"{where}: not valid JSON (nested too deeply); {_CURE}") from None
    if not isinstance(values, dict) or not values:
        raise ValueError(f"{where}: must be a mapping with at least one benchmark, got "
                         f"{'an empty one' if values == {} else type(values).__name__}; {_CURE}")
    return values


def _unique(items: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in items]
    if len(names) != len(set(names)):
        raise ValueError(f"the key '{next(name for name in names if names.count(name) > 1)}' occurs twice")
    return dict(items)


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _wrong_figures(path: str, name: str, value: Any) -> Iterator[str]:
    """The faults of a value and of everything in it. `name`: the figure's, which decides the range."""
    if isinstance(value, dict):
        for key, item in value.items():
            # In "change_type_accuracy_by_type" the keys are types of change and the values are figures of this name.
            own, of_parent, _ = name.partition("_by_")
            yield from _wrong_figures(f"{path}.{key}", own if of_parent and own in FIGURE_RANGES else key, item)
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _wrong_figures(f"{path}[{number}]", name, item)
    elif name == "num_pairs":
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            yield f"{path}: must be a whole number from 0, got {_short(value)}"
    elif (name in FIGURE_RANGES or not isinstance(value, str)) and not in_range(name, value):
        yield f"{path}: must be {_range_text(name)}, got {_short(value)}"


def _wrong_pairs(pairs: Any, table: Mapping[str, Any]) -> Iterator[str]:
    missing = [key for key in _PAIR_KEYS if not isinstance(pairs, dict) or key not in pairs]
    if missing:
        yield f": must have {', '.join(missing)}"
        return
    for key in ("protocol", "references"):
        if pairs[key] != table[key]:
            yield f".{key}: must be {table[key]!r} as in the scores of its split, got {_short(pairs[key])}"
    for key in ("pair_id", "group_id", *PAIR_METRICS):
        if not isinstance(pairs[key], list) or len(pairs[key]) != table["num_pairs"]:
            yield f".{key}: must be a list of num_pairs {table['num_pairs']} items, got {_short(pairs[key])}"
        elif key not in PAIR_METRICS:
            if not all(isinstance(item, str) for item in pairs[key]):
                yield f".{key}: must hold texts"
            elif key == "pair_id" and len(set(pairs[key])) != len(pairs[key]):
                yield ".pair_id: must hold each pair once"
        elif faults := list(_wrong_figures(f".{key}", key, pairs[key])):
            yield faults[0]
        elif abs(math.fsum(pairs[key]) / len(pairs[key]) - table[key]) > ROUNDING:
            yield (f".{key}: the mean of the pairs must be the score of the split, {table[key]:g}, got "
                   f"{math.fsum(pairs[key]) / len(pairs[key]):g}")


def _range_text(name: str) -> str:
    low, high = FIGURE_RANGES.get(name, (-LARGEST, LARGEST))
    return f"a number from {low:g} to {high:g}" if name in FIGURE_RANGES else "a finite number or a text"


def _short(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python prints
        text = f"a {type(value).__name__} of very many digits"
    return text if len(text) <= 60 else f"{text[:60]}..."


def _raise(where: str, faults: list[str]) -> None:
    if faults:
        raise ValueError("\n".join(f"{where}: {fault}; {_CURE}" for fault in faults[:20]))
