"""Stage `diffuse`: InstructPix2Pix edits the images of a collection as the writer said; filters keep what is good."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from onediff.config import load_params, load_runtime
from onediff.data.parallel import spread
from onediff.data.record import write_shards
from onediff.data.sources.collection import Entry, list_collection
from onediff.data.sources.entries import part, read_lines
from onediff.data.synthesis.diffusion import REASONS, Editor, Task, records_of
from onediff.files import new_folder, write_json
from onediff.library_logs import silence_libraries
from onediff.paths import PAIRS
from onediff.stages.command import run


def diffuse(source: str) -> None:
    """Reads data/instructed/<source>.jsonl and data/raw/<source>; writes data/pairs/<source>/.

    filters.json there counts what became of every sample.
    Raises ValueError if no edit passes the filters.
    """
    config, runtime = load_params(), load_runtime()
    settings, clip = config.data.diffusion, config.data.clip
    if settings is None or clip is None:
        raise ValueError(f"params.yaml: data.diffusion and data.clip are needed to edit the images of '{source}'")
    silence_libraries()
    tasks = list(_tasks(Path("data/instructed") / f"{source}.jsonl", list_collection(Path("data/raw") / source)))
    editor = Editor(source, settings, clip, seed=config.seed, max_megapixels=config.data.max_megapixels,
                    device=runtime.device, folder=(Path(runtime.scratch) / "diffuse").absolute())
    counts: Counter[str] = Counter()

    def places() -> Iterator[Path]:
        done = spread(editor, tasks, runtime, num_gpus=1)
        for place, fates in tqdm(done, total=len(tasks), desc=f"edit {source}", unit="image"):
            counts.update(fates)
            yield place

    out = PAIRS / source
    with new_folder(out) as folder:
        total = write_shards(records_of(places()), folder, "train", shard_pairs=config.data.shard_pairs)
        fates = {reason: counts[reason] for reason in REASONS}
        shown = ", ".join(f"{reason} {number:,}" for reason, number in fates.items())
        if not total:
            raise ValueError(f"'{source}': no edit passes the filters ({shown}); see data.diffusion in params.yaml")
        write_json(folder / "filters.json", fates, indent=1)
    print(f"{out}: {shown}")


def _tasks(path: Path, entries: list[Entry]) -> Iterator[Task]:
    if not path.exists():
        raise FileNotFoundError(f"{path} not found: 'dvc repro instruct@{path.stem}' has the writer make it")
    by_name = {entry.name: entry for entry in entries}
    for place, row in read_lines(path):
        name = part(row, "name", str, place)
        if name not in by_name:
            raise ValueError(f"{place}: image '{name}' is not in the collection; 'dvc repro instruct@{path.stem}'")
        yield Task(by_name[name], part(row, "edit", str, place), part(row, "output", str, place))


if __name__ == "__main__":
    run(diffuse)
