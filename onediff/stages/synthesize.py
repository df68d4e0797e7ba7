"""Stage `synthesize`: generated pairs, from a seed to Parquet shards."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

from tqdm import tqdm

from onediff.config import Config, load_params, load_runtime
from onediff.data.parallel import spread
from onediff.data.record import SPLITS, Record, write_shards
from onediff.data.synthesis.edits import edit_record
from onediff.data.synthesis.scenes import prepare, scene_records
from onediff.files import new_folder
from onediff.stages.command import run

Group = tuple[str, str, int]  # shard prefix, split, number within the split


def _groups(config: Config, source: str) -> Iterator[Group]:
    """Everything a source makes, in the order of its shards."""
    if source not in ("scenes", "edits"):
        raise ValueError(f"unknown source '{source}'; known are scenes and edits")
    counts = config.data.scenes.num_scenes if source == "scenes" else config.data.edits.num_pairs
    for split in SPLITS:
        yield from ((split, split, index) for index in range(getattr(counts, split)))
    if source == "scenes":
        yield from (("far", "test", index) for index in range(config.data.scenes.num_far))


def _maker(config: Config, source: str, device: str) -> Callable[[Group], list[Record]]:
    if source == "scenes":
        prepare(config, device)
    return functools.partial(_make, config, source)


def _by_blender(config: Config, source: str) -> bool:
    return source == "scenes" and config.data.scenes.renderer == "blender"


def _make(config: Config, source: str, group: Group) -> list[Record]:
    prefix, split, index = group
    if source == "edits":
        return [edit_record(config, split, index)]
    return scene_records(config, split, index, source="scenes_far" if prefix == "far" else "scenes")


def synthesize(source: str) -> None:
    """Writes data/synthetic/<source>/<split>-*.parquet. Neither the engine nor its processes change a byte."""
    config, runtime = load_params(), load_runtime()
    groups = list(_groups(config, source))
    made = spread(functools.partial(_maker, config, source, runtime.device), groups, runtime, chunk=8,
                  num_gpus=0.25 if _by_blender(config, source) else 0)
    shown = zip(groups, tqdm(made, total=len(groups), desc=source, unit="group"), strict=True)
    with new_folder(Path("data/synthetic") / source) as folder:
        for prefix, part in itertools.groupby(shown, key=lambda pair: pair[0][0]):
            records = itertools.chain.from_iterable(records for _, records in part)
            write_shards(records, folder, prefix, shard_pairs=config.data.shard_pairs)


if __name__ == "__main__":
    run(synthesize)
