"""Stage `probe`: one row of facts per pair."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
from tqdm import tqdm

from onediff.config import load_params, load_runtime
from onediff.data.probe import count_pairs, probe_folders, write_table
from onediff.stages.command import run

TABLE = Path("data/probe.parquet")


def probe() -> None:
    """Reads the records of every source that params.yaml lists, writes data/probe.parquet."""
    data, runtime = load_params().data, load_runtime()
    folders = {source: data.folder(source) for source in data.sources}
    tables = probe_folders(folders, max_megapixels=data.max_megapixels, clip=data.clip, runtime=runtime)
    write_table(_shown(tables, sum(count_pairs(folder) for folder in folders.values())), TABLE)


def _shown(tables: Iterator[pa.Table], total: int) -> Iterator[pa.Table]:
    with tqdm(total=total, desc="probe", unit="pair") as bar:
        for table in tables:
            yield table
            bar.update(len(table))


if __name__ == "__main__":
    run(probe)
