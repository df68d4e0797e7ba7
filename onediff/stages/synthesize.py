"""Stage `synthesize` generates the pairs of a source from the seed, and writes them as Parquet shards."""

import functools
import itertools
from collections.abc import Callable

from tqdm import tqdm

from onediff.config import Config, load_params, load_runtime
from onediff.data.parallel import spread
from onediff.data.record import SPLITS, Record, write_shards
from onediff.data.synthesis.edits.records import edit_records
from onediff.data.synthesis.scenes.records import scene_records
from onediff.files import new_folder
from onediff.paths import SYNTHETIC
from onediff.stages.command import run

Group = tuple[str, str, int]  # group of image pairs: prefix of its shard files, split, number of the group


def synthesize(source: str) -> None:
    """Generate the image pairs of a source, and write them to data/synthetic/SOURCE/SPLIT-*.parquet.

    The files do not depend on the number of processes or on whether Ray runs them.
    """
    config, runtime = load_params(), load_runtime()
    groups = _groups(config, source)
    by_blender = source == "scenes" and config.data.scenes.renderer == "blender"
    make = functools.partial(_start, config, source, runtime.device if by_blender else None)
    records_of_groups = spread(make, groups, runtime, chunk=8, num_gpus=0.25 if by_blender else 0)
    progress = zip(groups, tqdm(records_of_groups, total=len(groups), desc=source, unit="group"), strict=True)
    with new_folder(SYNTHETIC / source) as folder:
        for prefix, part in itertools.groupby(progress, key=lambda pair: pair[0][0]):
            records = itertools.chain.from_iterable(records for _, records in part)
            write_shards(records, folder, prefix, shard_pairs=config.data.shard_pairs)


def _groups(config: Config, source: str) -> list[Group]:
    """Return all groups of image pairs that must be generated for a source, in the order of the shard files."""
    if source not in ("scenes", "edits"):
        raise ValueError(f"the source to generate must be scenes or edits, got '{source}'")
    counts = config.data.scenes.num_scenes if source == "scenes" else config.data.edits.num_pairs
    num_groups: dict[tuple[str, str], int] = {(split, split): getattr(counts, split) for split in SPLITS}
    if source == "scenes":
        num_groups["far", "test"] = config.data.scenes.num_far
    return [(*prefix_and_split, index) for prefix_and_split, number in num_groups.items() for index in range(number)]


def _start(config: Config, source: str, blender_device: str | None) -> Callable[[Group], list[Record]]:
    """Return the function that generates the records of one group of image pairs. Each worker process calls this once.

    If `blender_device` is given, Blender starts here, so that a missing Blender is reported before any work.
    """
    if blender_device:
        from onediff.data.synthesis.scenes import blender

        blender.choose_device(blender_device)

    def make_records(group: Group) -> list[Record]:
        prefix, split, index = group
        if source == "edits":
            return edit_records(config, split, index)
        return scene_records(config, split, index, source="scenes_far" if prefix == "far" else "scenes")

    return make_records


if __name__ == "__main__":
    run(synthesize)
