"""Stage `diffuse` edits the images of a collection with InstructPix2Pix, and filters drop the bad edits.

The instructions come from the writer, the language model that writes texts for this project.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from onediff.config import load_params, load_runtime
from onediff.data.parallel import spread
from onediff.data.record import Record, write_shards
from onediff.data.sources.collection import list_collection
from onediff.data.sources.entries import part
from onediff.data.synthesis.diffusion import OUTCOMES, Editor, Task, records_of
from onediff.files import new_folder, write_json
from onediff.library_logs import silence_libraries
from onediff.paths import INSTRUCTED, PAIRS, RAW
from onediff.stages.command import run
from onediff.text_files import read_lines


def diffuse(source: str) -> None:
    """Edit the images in data/raw/SOURCE with the instructions in data/instructed/SOURCE.jsonl.

    The pairs of original and edited image are written to data/pairs/SOURCE/. filters.json in that folder counts how
    many edited images each filter rejected. Raises ValueError if the filters reject all edited images.
    """
    config, runtime = load_params(), load_runtime()
    settings, clip = config.data.diffusion, config.data.clip
    if settings is None or clip is None:
        raise ValueError(f"params.yaml: data.diffusion and data.clip must be set to edit the images of '{source}'; "
                         "presets/paper.yaml has both")
    silence_libraries()
    tasks = list(_tasks(source))
    editor = Editor(source, settings, clip, seed=config.seed, max_megapixels=config.data.max_megapixels,
                    device=runtime.device, folder=(Path(runtime.scratch) / "diffuse").absolute())
    counts = Counter(dict.fromkeys(OUTCOMES, 0))

    def records() -> Iterator[Record]:
        finished = spread(editor, tasks, runtime, num_gpus=1)
        for folder, outcomes in tqdm(finished, total=len(tasks), desc=f"edit {source}", unit="image"):
            counts.update(outcomes)
            yield from records_of(folder)

    with new_folder(PAIRS / source) as out:
        total = write_shards(records(), out, "train", shard_pairs=config.data.shard_pairs)
        summary = ", ".join(f"{outcome} {count:,}" for outcome, count in counts.items())
        if not total:
            raise ValueError(f"source '{source}': no edited image passed the filters ({summary}); "
                             "change the limits in data.diffusion in params.yaml")
        write_json(out / "filters.json", counts, indent=1)
    print(f"{PAIRS / source}: {summary}")


def _tasks(source: str) -> Iterator[Task]:
    path = INSTRUCTED / f"{source}.jsonl"
    entries = {entry.name: entry for entry in list_collection(RAW / source)}
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; 'dvc repro instruct@{source}' writes it")
    for place, row in read_lines(path):
        name = part(row, "name", str, place)
        if name not in entries:
            raise ValueError(f"{place}: image '{name}' is not in data/raw/{source}; run 'dvc repro instruct@{source}'")
        yield Task(entries[name], part(row, "edit", str, place), part(row, "output", str, place))


if __name__ == "__main__":
    run(diffuse)
