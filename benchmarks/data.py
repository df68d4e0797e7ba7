"""Measures the time and memory of the data stages, DVC and the loader on generated pairs; one table.

    python -m benchmarks.data --pairs 100000                             # all steps, in .onediff/benchmark
    python -m benchmarks.data --step build --folder .onediff/benchmark   # one step, on existing data
"""

import io
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
from PIL import Image
from rich.table import Table
from ruamel.yaml import YAML
from transformers import AutoTokenizer
from typer import Option

from benchmarks import script
from benchmarks.script import ROOT
from onediff.config import load_params
from onediff.data.batches.corpus import Corpus
from onediff.data.batches.loader import decode
from onediff.data.record import write_shards
from onediff.data.synthesis.edits.records import edit_record
from onediff.inputs.processing import OneDiffProcessor, load_image_processor

PX = 64  # The width and height of the images in all steps except the loader.
LOADER_PX = 336  # The width and height of the images that the vision encoder of the paper takes.
STORED_PX = 512  # The width and height of the stored images that the loader reads and resizes.
LOADER_PAIRS, LOADER_BATCH = 256, 16
LEAST_PAIRS = 1000
BACKBONES = ROOT / "presets/backbones/tiny"
STEPS = ("synthesize", "probe", "validate", "build", "dvc", "loader")

Result = tuple[str, str, float | None]  # the name of the measurement, the time or speed, and the peak memory in GiB


def main(pairs: Annotated[int, Option(help="Number of pairs to generate in a new folder.")] = 100_000,
         folder: Annotated[Path, Option(help="Project folder; existing data is used again.")] = (
             Path(".onediff/benchmark")),
         step: Annotated[list[str] | None, Option(help=f"Any of {', '.join(STEPS)}; default: all.")] = None) -> None:
    """Measure the data stages, DVC and the loader on generated pairs."""
    for name in step or ():
        if name not in STEPS:
            raise ValueError(f"--step {name}: must be one of {', '.join(STEPS)}; correct the option")
    folder = folder.resolve()
    if not (folder / "params.yaml").exists():
        prepare(folder, pairs)
    table = Table("step", "result", "peak memory", title=f"{folder}, {os.cpu_count()} cores")
    for name in step or STEPS:
        for what, result, gib in _results(name, folder):
            table.add_row(what, result, "" if gib is None else f"{gib:.2f} GiB")
    script.show(table)


def prepare(folder: Path, pairs: int) -> None:
    """Write a params.yaml for `pairs` pairs of small images; about three quarters are scenes, and the rest are edits.

    Raises ValueError if `pairs` is not a multiple of LEAST_PAIRS.
    """
    if pairs < LEAST_PAIRS or pairs % LEAST_PAIRS:
        raise ValueError(f"--pairs must be a positive multiple of {LEAST_PAIRS}, got {pairs}; change the option")
    yaml, unit = YAML(), pairs // LEAST_PAIRS
    values = yaml.load(ROOT / "presets/tiny.yaml")
    values["data"]["image_px"] = PX
    # A scene gives three pairs in the train split and four pairs in the other splits.
    values["data"]["scenes"] |= {"num_far": 5 * unit, "num_scenes": {
        "train": 200 * unit, "val": 10 * unit, "gate": 10 * unit, "test": 20 * unit}}
    values["data"]["edits"]["num_pairs"] = {"train": 200 * unit, "val": 6 * unit, "gate": 6 * unit, "test": 8 * unit}
    folder.mkdir(parents=True, exist_ok=True)
    yaml.dump(values, folder / "params.yaml")


def _results(step: str, folder: Path) -> Iterator[Result]:
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


def measured(what: str, command: list[str], folder: Path) -> Result:
    """Run a command in `folder`; return `what`, the seconds, and the peak memory of all processes of the command.

    The resident memory is read ten times per second. Raises ValueError if the command fails.
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    start, peak = time.monotonic(), 0
    with (tempfile.TemporaryFile() as stderr,
          psutil.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=stderr) as process):
        while process.poll() is None:
            resident = 0
            for each in [process, *process.children(recursive=True)]:
                with suppress(psutil.Error):  # A process may end between listing and reading its memory.
                    resident += each.memory_info().rss
            peak = max(peak, resident)
            time.sleep(0.1)
        stderr.seek(0)
        if process.returncode:
            raise ValueError(f"{what}: {stderr.read().decode(errors='replace').strip()[-400:]}")
    return what, f"{time.monotonic() - start:.1f} s", peak / 2**30


def dvc(folder: Path) -> Iterator[Result]:
    """Measure DVC on the folder data/diffcap: `dvc add` and `dvc push`, then `dvc pull` and `dvc checkout` in a clone.

    The DVC remote is a local folder.
    """
    project, clone = folder / "dvc/project", folder / "dvc/clone"
    shutil.rmtree(folder / "dvc", ignore_errors=True)
    shutil.copytree(folder / "data/diffcap", project / "diffcap")
    tool = [sys.executable, "-m", "dvc"]
    for setup in (["init", "-q", "--no-scm"], ["config", "core.analytics", "false"],
                  ["remote", "add", "-q", "-d", "shelf", str(folder / "dvc/remote")]):
        subprocess.run([*tool, *setup], cwd=project, check=True)
    yield measured("dvc add", [*tool, "add", "diffcap"], project)
    yield measured("dvc push", [*tool, "push"], project)
    shutil.copytree(project / ".dvc", clone / ".dvc", ignore=shutil.ignore_patterns("cache", "tmp"))
    shutil.copy(project / "diffcap.dvc", clone)
    yield measured("dvc pull, fresh", [*tool, "pull"], clone)
    shutil.rmtree(clone / "diffcap")
    yield measured("dvc checkout", [*tool, "checkout"], clone)
    shutil.rmtree(folder / "dvc")


def loader(folder: Path) -> Iterator[Result]:
    """Measure how many pairs per second the data loader reads and decodes on one core, compared with a Pillow loop.

    The loader and the Pillow loop take turns after each batch, in one process with one thread. Processor time is
    measured instead of wall time, because other processes on the machine influence processor time less.
    """
    torch.set_num_threads(1)
    shards = folder / "loader"
    if not shards.exists():
        config = load_params(folder / "params.yaml")
        config = config.model_copy(update={"data": config.data.model_copy(update={"image_px": STORED_PX})})
        write_shards((edit_record(config, "train", index) for index in range(LOADER_PAIRS)), shards, "train",
                     shard_pairs=LOADER_PAIRS)

    def read() -> Corpus:
        shutil.rmtree(folder / "corpus", ignore_errors=True)
        return Corpus.read(shards, "train", ["edits"], store=folder / "corpus")

    reading_s = min(_processor_s(read) for _ in range(3))  # The first call also loads pyarrow, so it takes longer.
    corpus = read()
    images = load_image_processor(BACKBONES / "vision")
    images.size = images.crop_size = {"height": LOADER_PX, "width": LOADER_PX}
    pixels_of = decode(corpus, OneDiffProcessor(images, AutoTokenizer.from_pretrained(BACKBONES / "language")))
    names = [name for sample in corpus.samples for name in sample.images]
    batches = [names[start : start + 2 * LOADER_BATCH] for start in range(0, len(names), 2 * LOADER_BATCH)]
    seconds = [(_processor_s(pixels_of, batch), _processor_s(_bare, [corpus.files[name] for name in batch]))
               for batch in [batches[0], *batches]]  # The first batch is used twice, and once only to warm up.
    decoding_s, bare_s = (sum(column) for column in zip(*seconds[1:], strict=True))
    count, ours_s = len(corpus.samples), decoding_s + reading_s
    yield "read shards", f"{count / reading_s:.0f} pairs/s", None
    yield f"loader, {LOADER_PX} px", f"{count / ours_s:.1f} pairs/s", None
    yield f"bare Pillow, {LOADER_PX} px", f"{count / bare_s:.1f} pairs/s; loader / bare {bare_s / ours_s:.3f}", None


def _bare(files: list[bytes]) -> None:
    """Decode and resize images with Pillow only."""
    for content in files:
        with Image.open(io.BytesIO(content)) as image:
            image.convert("RGB").resize((LOADER_PX, LOADER_PX), Image.Resampling.BICUBIC)


def _processor_s(work: Callable[..., Any], *args: Any) -> float:
    """Call a function and return the processor time in seconds."""
    start = time.process_time()
    work(*args)
    return time.process_time() - start


if __name__ == "__main__":
    script.main(main)
