"""Stage `synthesize`: generated pairs, from a seed to Parquet shards."""

from __future__ import annotations

import functools
import itertools
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from tqdm import tqdm

from onediff.config import SPLITS, Config, load_params, load_runtime
from onediff.data.record import Record, write_shards
from onediff.data.synthesis.edits import edit_record
from onediff.data.synthesis.scenes import scene_records
from onediff.stages import run


def _edit(config: Config, split: str, index: int) -> list[Record]:
    return [edit_record(config, split, index)]


def _plan(config: Config, source: str) -> Iterator[tuple[str, str, int, Callable[..., list[Record]]]]:
    """(shard prefix, split, number of groups, maker) of everything a source makes."""
    if source == "edits":
        yield from ((split, split, getattr(config.data.edits.num_pairs, split), _edit) for split in SPLITS)
    elif source == "scenes":
        yield from ((split, split, getattr(config.data.scenes.num_scenes, split), scene_records) for split in SPLITS)
        yield "far", "test", config.data.scenes.num_far, functools.partial(scene_records, source="scenes_far")
    else:
        raise ValueError(f"synthesize: unknown source '{source}'; known are scenes and edits")


def synthesize(source: str) -> None:
    """Writes data/synthetic/<source>/<split>-*.parquet. The number of processes does not change a byte."""
    config, runtime = load_params(), load_runtime()
    folder = Path("data/synthetic") / source
    shutil.rmtree(folder, ignore_errors=True)
    with ProcessPoolExecutor(runtime.num_workers) as pool:
        for prefix, split, count, maker in _plan(config, source):
            made = pool.map(functools.partial(maker, config, split), range(count), chunksize=8)
            shown = tqdm(made, total=count, desc=f"{source} {prefix}", unit="group")
            write_shards(itertools.chain.from_iterable(shown), folder, prefix, shard_pairs=config.data.shard_pairs)


if __name__ == "__main__":
    run(synthesize)
