"""How long the data path takes and how much memory, on this machine, with generated pairs; one table.

    python -m benchmarks.data --pairs 100000                      # everything, in .onediff/benchmark
    python -m benchmarks.data --step build --folder .onediff/benchmark   # one step again, on what is there
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from PIL import Image
from rich.console import Console
from rich.table import Table
from ruamel.yaml import YAML

from onediff.config import load_params  # before torch: see onediff/__init__.py

ROOT = Path(__file__).parents[1]
PX, LOADER_PX, STORED_PX = 64, 336, 512  # of the many pairs; of the tower; of the images that the loader reads
LOADER_PAIRS, LOADER_BATCH = 256, 16
LEAST_PAIRS = 1000

Row = tuple[str, str, float | None]  # what, how long or how fast, GiB
STEPS = ("synthesize", "probe", "validate", "build", "dvc", "loader")


def main(pairs: Annotated[int, typer.Option(help="How many, if they are to be made.")] = 100_000,
         folder: Annotated[Path, typer.Option(help="A project of its own; its shards are used if it has some.")] = (
             Path(".onediff/benchmark")),
         step: Annotated[list[str] | None, typer.Option(help=f"Any of {', '.join(STEPS)}; all without.")] = None,
         ) -> None:
    """Times of probe, validate, build, DVC and the loader on generated pairs."""
    for name in step or ():
        if name not in STEPS:
            raise ValueError(f"--step {name}: must be one of {', '.join(STEPS)}")
    folder = folder.resolve()
    if not (folder / "params.yaml").exists():
        prepare(folder, pairs)
    table = Table("step", "result", "peak memory", title=f"{folder}, {os.cpu_count()} cores")
    for name in step or STEPS:
        for what, result, gib in _rows(name, folder):
            table.add_row(what, result, "" if gib is None else f"{gib:.2f} GiB")
    Console(width=max(100, Console().width)).print(table)


def prepare(folder: Path, pairs: int) -> None:
    """params.yaml for `pairs` pairs of 64 px: three quarters of rendered scenes, the rest edits. Raises ValueError."""
    if pairs < LEAST_PAIRS or pairs % LEAST_PAIRS:
        raise ValueError(f"--pairs must be a multiple of {LEAST_PAIRS}, got {pairs}")
    yaml, unit = YAML(), pairs // LEAST_PAIRS
    values = yaml.load((ROOT / "presets/tiny.yaml").read_text(encoding="utf-8"))
    values["data"]["image_px"] = PX
    # A scene of train gives three pairs, one of another split four.
    values["data"]["scenes"] |= {"num_far": 5 * unit, "num_scenes": {
        "train": 200 * unit, "val": 10 * unit, "gate": 10 * unit, "test": 20 * unit}}
    values["data"]["edits"]["num_pairs"] = {"train": 200 * unit, "val": 6 * unit, "gate": 6 * unit, "test": 8 * unit}
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "params.yaml").open("w", encoding="utf-8") as file:
        yaml.dump(values, file)


def _rows(step: str, folder: Path) -> Iterator[Row]:
    if step == "synthesize":
        for source in ("scenes", "edits"):
            if not (folder / "data/synthetic" / source).exists():
                command = [sys.executable, "-m", "onediff.stages.synthesize", source]
                yield measured(f"synthesize {source}", command, folder)
    elif step == "dvc":
        yield from dvc(folder)
    elif step == "loader":
        yield from loader(folder)
    else:
        yield measured(step, [sys.executable, "-m", f"onediff.stages.{step}"], folder)


def measured(what: str, command: list[str], folder: Path) -> Row:
    """Runs it; seconds, and the peak of resident memory summed over its processes, looked at ten times a second.

    Raises ValueError if it fails.
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    start, peak = time.monotonic(), 0
    with (tempfile.TemporaryFile() as said,
          psutil.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=said) as process):
        while process.poll() is None:
            peak = max(peak, _resident(process))
            time.sleep(0.1)
        said.seek(0)
        if process.returncode:
            raise ValueError(f"{what}: {said.read().decode(errors='replace').strip()[-400:]}")
    return what, f"{time.monotonic() - start:.1f} s", peak / 2**30


def _resident(process: psutil.Process) -> int:
    total = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            total += one.memory_info().rss
        except psutil.Error:  # it has just ended
            continue
    return total


def dvc(folder: Path) -> Iterator[Row]:
    """`add`, `push` to a folder as remote, and `pull` in another place that has neither cache nor shards."""
    place, clone = folder / "dvc/project", folder / "dvc/clone"
    shutil.rmtree(folder / "dvc", ignore_errors=True)
    place.mkdir(parents=True)
    shutil.copytree(folder / "data/diffcap", place / "diffcap")
    tool = [sys.executable, "-m", "dvc"]
    for setup in (["init", "-q", "--no-scm"], ["config", "core.analytics", "false"],
                  ["remote", "add", "-q", "-d", "shelf", str(folder / "dvc/remote")]):
        subprocess.run([*tool, *setup], cwd=place, check=True)
    yield measured("dvc add", [*tool, "add", "diffcap"], place)
    yield measured("dvc push", [*tool, "push"], place)
    shutil.copytree(place / ".dvc", clone / ".dvc", ignore=shutil.ignore_patterns("cache", "tmp"))
    shutil.copy(place / "diffcap.dvc", clone)
    yield measured("dvc pull, fresh", [*tool, "pull"], clone)
    shutil.rmtree(clone / "diffcap")
    yield measured("dvc checkout", [*tool, "checkout"], clone)
    shutil.rmtree(folder / "dvc")


# --- the loader -------------------------------------------------------------------------------------------------------


def loader(folder: Path) -> Iterator[Row]:
    """Pairs per second and core: from shards to tensors, beside a bare Pillow loop over the same bytes.

    Both take turns, batch by batch, in one process with one thread; processor time is counted, not the clock's, so
    that a neighbour on the machine does not decide.
    """
    import torch

    from onediff.data.batches.corpus import Corpus
    from onediff.data.batches.loader import decode

    torch.set_num_threads(1)
    shards = _stored_pairs(folder)

    def read() -> Corpus:
        shutil.rmtree(folder / "corpus", ignore_errors=True)
        return Corpus.read(shards, "train", ["edits"], store=folder / "corpus")

    reading, corpus = min((_processor_time(read) for _ in range(3)),
                          key=lambda timed: timed[0])  # the first also starts pyarrow
    pixels_of = decode(corpus, _processor())
    names = [name for sample in corpus.samples for name in sample.images]
    batches = [names[start : start + 2 * LOADER_BATCH] for start in range(0, len(names), 2 * LOADER_BATCH)]
    ours = bare = 0.0
    for batch in [batches[0], *batches]:  # the first once more, to warm up
        if batch is batches[0]:
            ours = bare = 0.0
        ours += _processor_time(lambda batch=batch: pixels_of(batch))[0]  # type: ignore[misc]
        bare += _processor_time(lambda batch=batch: _bare([corpus.files[name] for name in batch]))[0]  # type: ignore[misc]
    count, ours = len(corpus.samples), ours + reading
    yield "read shards", f"{count / reading:.0f} pairs/s", None
    yield f"loader, {LOADER_PX} px", f"{count / ours:.1f} pairs/s", None
    yield f"bare Pillow, {LOADER_PX} px", f"{count / bare:.1f} pairs/s; loader / bare {bare / ours:.3f}", None


def _stored_pairs(folder: Path) -> Path:
    """Shards of edits at 512 px, made once."""
    from onediff.data.record import write_shards
    from onediff.data.synthesis.edits.records import edit_record

    shards = folder / "loader"
    if not shards.exists():
        config = load_params(folder / "params.yaml")
        config = config.model_copy(update={"data": config.data.model_copy(update={"image_px": STORED_PX})})
        write_shards((edit_record(config, "train", index) for index in range(LOADER_PAIRS)), shards, "train",
                     shard_pairs=LOADER_PAIRS)
    return shards


def _processor() -> Any:
    from transformers import AutoTokenizer

    from onediff.inputs.processing import OneDiffProcessor, load_image_processor

    images = load_image_processor(ROOT / "presets/backbones/tiny/vision")
    images.size = images.crop_size = {"height": LOADER_PX, "width": LOADER_PX}
    return OneDiffProcessor(images, AutoTokenizer.from_pretrained(ROOT / "presets/backbones/tiny/language"))


def _bare(files: list[bytes]) -> None:
    for content in files:
        with Image.open(io.BytesIO(content)) as image:
            image.convert("RGB").resize((LOADER_PX, LOADER_PX), Image.Resampling.BICUBIC)


def _processor_time(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


if __name__ == "__main__":
    try:
        typer.run(main)
    except (ValueError, OSError) as error:
        sys.exit(f"benchmarks.data: {error}")
