"""The loader: from shards to tensors beside a bare Pillow loop, and how long training waits for it; two tables.

    python -m benchmarks.loader                        # tiny, 0, 1 and 2 workers
    python -m benchmarks.loader --preset small --steps 6

"alone": seconds from one step's tensors to the next one's where nobody trains; "in a run": the same while `fit` trains,
that is how long it waits, and the share of the run that this is. "pixels": images are decoded at every step,
"features": the frozen tower's come from the store. The runs follow one another, for workers make batches ahead while
others have their turn. The first table is that of `python -m benchmarks.data --step loader`.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from benchmarks import data, models, rows, turns
from benchmarks.turns import Contender, Ended, Turn

if TYPE_CHECKING:
    from onediff.data.loader import Batch

WORKERS = (0, 1, 2)
PAIRS = 1000  # of the project for the first table, which makes its own pairs at 512 px


def main(preset: Annotated[str, typer.Option(help=f"One of {', '.join(models.PRESETS)}.")] = "tiny",
         work: Annotated[str, typer.Option(help="pairs or mixed.")] = "pairs", batch: int = 32, rounds: int = 2,
         steps: Annotated[int, typer.Option(help="Of a round.")] = 10, device: str = "cpu", threads: int = 1,
         shards: Annotated[bool, typer.Option(help="The first table, too.")] = True) -> None:
    """Times of the loader."""
    models.settings(preset)
    if shards:
        _show_shards(models.HOME / "data")
    shared = {"preset": preset, "batch": batch, "device": device, "threads": threads, "work": work, "units": 2,
              "steps": steps, "lora": False, "micro": None, "checkpoint_activations": False, "model": {}}
    contenders = [Contender(f"{'features' if cached else 'pixels'}, {'in a run' if trains else 'alone'}",
                            "benchmarks.loader", shared | {"cached": cached, "trains": trains, "workers": workers})
                  for cached in (False, True) for trains in (False, True) for workers in WORKERS]
    turns.race(contenders, rounds=rounds, units=1, threads=threads, together=False)
    table = Table("loader", "workers", "s a step", "s waiting", "share",
                  title=f"{preset}, {batch} rows a step, {work}, {device}, {len(os.sched_getaffinity(0))} cores")
    for contender in contenders:
        waited = median(contender.facts["waited_s"])  # a round each
        took = median(contender.rounds)
        table.add_row(contender.name, str(contender.case["workers"]), f"{took / steps:.3f}", f"{waited / steps:.4f}",
                      f"{waited / took:.1%}" if contender.case["trains"] else "")
    turns.show(table)


def _show_shards(folder: Path) -> None:
    if not (folder / "params.yaml").exists():
        data.prepare(folder, PAIRS)
    table = Table("from shards to tensors, one core", "result")
    for what, result, _ in data.loader(folder):
        table.add_row(what, result)
    turns.show(table)


def contender(case: dict[str, Any], turn: Turn) -> None:
    import torch

    from benchmarks.train_step import Bench
    from onediff.data.loader import stream
    from onediff.train import phases

    torch.set_num_threads(case["threads"])
    bench = Bench(case)
    model, processor = models.onediff(bench.config, case["device"])
    count = Steps(turn, case["steps"])
    setattr(phases, "stream", partial(waiting, stream, count, trains=case["trains"]))  # noqa: B010
    runtime = bench.runtime.model_copy(update={"loader_workers": case["workers"]})
    with tempfile.TemporaryDirectory() as folder:
        phases._train(bench.name, bench.phase, runtime, model=model, processor=processor, corpus=bench.corpus,
                      rows=rows.shuffled(bench.batches), folder=Path(folder), log=count, num_samples=1)


class Steps:
    """Called after every step: each `num` of them are a unit, the first unit the warm-up."""

    def __init__(self, turn: Turn, num: int) -> None:
        self.turn, self.num, self.done, self.waited_s = turn, num, 0, 0.0

    def __call__(self, *_: Any) -> None:
        self.done += 1
        if self.done % self.num:
            return
        told: list[float] = self.turn.facts.setdefault("waited_s", [])
        if self.done > self.num:
            told.append(self.waited_s)
        if not self.turn():
            raise Ended
        self.waited_s = 0.0


def waiting(stream: Callable[..., Iterator[list[Batch]]], count: Steps, *given: Any, trains: bool,
            **named: Any) -> Iterator[list[Batch]]:
    """The stream with its waits added up; with nobody training, the steps end here."""
    coming = stream(*given, **named)
    while True:
        start = time.perf_counter()
        batches = next(coming)
        count.waited_s += time.perf_counter() - start
        if trains:
            yield batches
        else:
            count()


if __name__ == "__main__":
    if turns.CASE in os.environ:
        turns.contend(contender)
    else:
        try:
            typer.run(main)
        except (ValueError, OSError) as error:
            sys.exit(f"benchmarks.loader: {error}")
