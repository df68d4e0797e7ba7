"""Stage `validate`: may the pairs be used? Report and quarantine first, then stop or go on."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from onediff.config import load_params
from onediff.data.checks import find_bad, judged, require, write_report
from onediff.stages import run
from onediff.stages.probe import TABLE

QUARANTINE, REPORTS = Path("data/quarantine.parquet"), Path("data/reports/validation")


def validate() -> None:
    """Reads data/probe.parquet; writes data/quarantine.parquet and data/reports/validation/.

    Raises ValueError for too many bad pairs or a broken fatal rule, after both are written.
    """
    tolerance = load_params().data.tolerance
    if not TABLE.exists():
        raise FileNotFoundError(f"{TABLE} not found: 'dvc repro probe' makes it")
    table = judged(pd.read_parquet(TABLE))
    bad = find_bad(table)
    bad.to_parquet(QUARANTINE, index=False)
    report = write_report(table, bad, REPORTS, tolerance=tolerance)
    require(table, bad, tolerance=tolerance, report=report)


if __name__ == "__main__":
    run(validate)
