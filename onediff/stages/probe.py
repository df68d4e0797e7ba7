"""Stage `probe`: one row of facts per pair."""

from __future__ import annotations

import itertools
from pathlib import Path

from tqdm import tqdm

from onediff.config import load_params, load_runtime
from onediff.data.probe import count_pairs, probe_folder, write_rows
from onediff.stages import run

SYNTHETIC, TABLE = Path("data/synthetic"), Path("data/probe.parquet")


def probe() -> None:
    """Reads data/synthetic, writes data/probe.parquet."""
    config, runtime = load_params(), load_runtime()
    folders = [SYNTHETIC / source for source in config.data.sources]
    total = sum(count_pairs(folder) for folder in folders)
    rows = itertools.chain.from_iterable(
        probe_folder(folder, max_megapixels=config.data.max_megapixels, workers=runtime.num_workers)
        for folder in folders
    )
    write_rows(tqdm(rows, total=total, desc="probe", unit="pair"), TABLE)


if __name__ == "__main__":
    run(probe)
