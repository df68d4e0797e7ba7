"""The loader: from shards to tensors beside a bare Pillow loop, and how long training waits for it; two tables.

    python -m benchmarks.loader                        # tiny, 0, 1 and 2 workers
    python -m benchmarks.loader --preset small --steps 6

From asking for a step's tensors to having them: "alone" where nobody trains, "in a run" while `fit` trains, with the
share of the run that it waits. "pixels": images are decoded at every step, "features": the frozen tower's come from the
store. The runs follow one another, for workers make batches ahead while others have their turn. The first table is that
of `python -m benchmarks.data --step loader`.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from benchmarks import data, models, turns
from benchmarks.turns import Contender, Ended, Turn

if TYPE_CHECKING:
    from benchmarks.train_step import Bench
    from onediff.data.batches.loader import Batch

WORKERS = (0, 1, 2)
PAIRS = 1000  # of the project for the first table, which makes its own pairs at 512 px


def main(preset: Annotated[str, typer.Option(help=f"One of {', '.join(models.PRESETS)}.")] = "tiny",
         work: Annotated[str, typer.Option(help="pairs or mixed.")] = "pairs", batch: int = 32, rounds: int = 1,
         steps: Annotated[int, typer.Option(help="Of a round.")] = 10, device: str = "cpu", threads: int = 1,
         shards: Annotated[bool, typer.Option(help="The first table, too.")] = True) -> None:
    """Times of the loader."""
    models.settings(preset)
    if shards:
        _show_shards(models.HOME / "data")
    shared = {"preset": preset, "batch": batch, "device": device, "threads": threads, "work": work, "units": 2,
              "steps": steps, "lora": False, "micro": None, "checkpoint_activations": False, "model": {}}
    kinds = [{"cached": cached, "workers": workers} for cached in (False, True) for workers in WORKERS]
    alone = Contender("alone", "benchmarks.loader", shared | {"kinds": kinds})
    runs = [Contender("in a run", "benchmarks.loader", shared | kind | {"kinds": [kind], "trains": True})
            for kind in kinds]
    turns.race([alone], rounds=1, units=len(kinds) - 1, threads=threads)
    turns.race(runs, rounds=rounds, units=1, threads=threads, together=False)
    table = Table("loader", "workers", "ms, alone", "ms, in a run", "ms, the run's step", "share of the run",
                  title=f"{preset}, {batch} rows a step, {work}, {device}, {len(os.sched_getaffinity(0))} cores")
    for run, bare in zip(runs, alone.facts["waited_s"], strict=True):
        waited, took = median(run.facts["waited_s"]), median(run.rounds)
        table.add_row("features" if run.case["cached"] else "pixels", str(run.case["workers"]),
                      *(f"{1e3 * seconds / steps:.1f}" for seconds in (bare, waited, took)), f"{waited / took:.1%}")
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

    torch.set_num_threads(case["threads"])
    turn.facts["waited_s"] = []
    for kind in case["kinds"]:
        with suppress(Ended):
            load(Bench(case | kind), turn)


def load(bench: Bench, turn: Turn) -> None:
    from onediff.data.batches.loader import stream
    from onediff.train import phases

    case = bench.case
    model, processor = models.onediff(bench.config, case["device"])
    count = Steps(turn, case["steps"], trains=case.get("trains", False))
    setattr(phases, "stream", partial(waiting, stream, count))  # noqa: B010
    runtime = bench.runtime.model_copy(update={"loader_workers": case["workers"]})
    with tempfile.TemporaryDirectory() as folder:
        phases.train(replace(bench.training(model, processor, Path(folder)), runtime=runtime), count)


class Steps:
    """Called after every step: each `num` of them are a unit, the first unit the warm-up."""

    def __init__(self, turn: Turn, num: int, *, trains: bool) -> None:
        self.turn, self.num, self.trains, self.done, self.waited_s = turn, num, trains, 0, 0.0

    def __call__(self, *_: Any) -> None:
        self.done += 1
        if self.done % self.num:
            return
        if self.done > self.num:
            self.turn.facts["waited_s"].append(self.waited_s)
        if (self.trains or self.done > self.num) and (not self.turn() or not self.trains):
            raise Ended
        self.waited_s = 0.0


def waiting(stream: Callable[..., Iterator[list[Batch]]], count: Steps, *given: Any,
            **named: Any) -> Iterator[list[Batch]]:
    """The stream with its waits added up; with nobody training, the steps end here."""
    coming = stream(*given, **named)
    while True:
        start = time.perf_counter()
        batches = next(coming)
        count.waited_s += time.perf_counter() - start
        if count.trains:
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
