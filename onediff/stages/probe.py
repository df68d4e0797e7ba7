"""Stage `probe` measures every pair and writes one row of facts for each: sizes, hashes, caption lengths, split."""

from collections.abc import Iterator

import pyarrow as pa
from tqdm import tqdm

from onediff.config import load_params, load_runtime
from onediff.data.folders import folder_of, sources_of
from onediff.data.quality.probe import count_pairs, probe_folders, write_table
from onediff.paths import PROBE_TABLE
from onediff.stages.command import run


def probe() -> None:
    """Measure the image pairs of every source that params.yaml lists, and write the results to data/probe.parquet."""
    data, runtime = load_params().data, load_runtime()
    folders = {source: folder_of(data, source) for source in sources_of(data)}
    tables = probe_folders(folders, max_megapixels=data.max_megapixels, clip=data.clip, runtime=runtime)
    write_table(_shown(tables, sum(count_pairs(folder) for folder in folders.values())), PROBE_TABLE)


def _shown(tables: Iterator[pa.Table], total: int) -> Iterator[pa.Table]:
    with tqdm(total=total, desc="probe", unit="pair") as bar:
        for table in tables:
            yield table
            bar.update(len(table))


if __name__ == "__main__":
    run(probe)
