"""Predictions and references in JSONL files, one pair a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from onediff.eval.pairs import Predictions, References


def read_references(path: Path) -> References:
    """The references of a JSONL file by pair_id. Raises ValueError naming file and line, or for an empty file."""
    truth = _read_jsonl(path, "references")
    for key, texts in truth.items():
        if not (isinstance(texts, list) and all(isinstance(text, str) for text in texts)):
            raise ValueError(f"{path}: 'references' of {key!r} must be a list of strings, got {texts!r}")
    if not truth:
        raise ValueError(f"{path}: no line; one per pair is needed")
    return truth


def read_groups(path: Path) -> dict[str, str]:
    """pair_id -> `group_id` of a JSONL file of references; pairs without one are groups of their own."""
    return {key: str(row.get("group_id", key)) for key, row in _read_rows(path, "references").items()}


def read_predictions(path: Path) -> Predictions:
    """The predictions of a JSONL file by pair_id. Raises ValueError naming file and line."""
    said = _read_jsonl(path, "prediction")
    for key, text in said.items():
        if not isinstance(text, str):
            raise ValueError(f"{path}: 'prediction' of {key!r} must be a string, got {text!r}")
    return said


def _read_jsonl(path: Path, field: str) -> dict[str, Any]:
    return {key: row[field] for key, row in _read_rows(path, field).items()}


def _read_rows(path: Path, field: str) -> dict[str, dict[str, Any]]:
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
