"""Paths below data/ that several modules share."""

from __future__ import annotations

from pathlib import Path

PROBE_TABLE = Path("data/probe.parquet")
QUARANTINE = Path("data/quarantine.parquet")
DIFFCAP = Path("data/diffcap")
TRAINED = Path("data/models/tune")
