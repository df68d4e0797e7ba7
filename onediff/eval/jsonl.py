"""Predictions in JSONL files, one pair a line, and any other lines about pairs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onediff.eval.metrics.words import Predictions

PairRow = Mapping[str, Any]  # pair_id, references; where known group_id, change_type, provenance


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
    """Rounds scores to six decimal places, so that the order of a floating-point sum does not change the file."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return round(value, 6) if isinstance(value, float) else value
