"""Paths below data/ that several modules share."""

from __future__ import annotations

from pathlib import Path

DIFFCAP = Path("data/diffcap")
TRAINED = Path("data/models/tune")
