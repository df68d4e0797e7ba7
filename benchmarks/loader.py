"""Measures how long training waits for the data loader; one table.

    python -m benchmarks.loader                        # preset tiny with 0, 1 and 2 loader workers
    python -m benchmarks.loader --preset small --steps 6

The waiting time is from the request for a step's tensors until they are ready. It is measured without training
("alone") and during training with `fit` ("in a run"). With "pixels", images are decoded at every step; with "features",
stored features of the frozen vision tower are read. Runs do not take turns, because loader workers would prepare
batches while another run has its turn. The speed of the loader is measured by `python -m benchmarks.data --step
loader`.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
from rich.table import Table
from typer import Option

from benchmarks import models, script, turns
from benchmarks.rows import MIXTURES, Bench
from benchmarks.turns import Contender, Ended, Turn
from onediff.data.batches.loader import Batch, stream
from onediff.train import phases

WORKERS = (0, 1, 2)


def main(preset: Annotated[str, Option(help=f"One of {', '.join(models.PRESETS)}.")] = "tiny",
         work: Annotated[str, Option(help=f"One of {', '.join(MIXTURES)}.")] = "pairs", batch: int = 32,
         rounds: int = 1, steps: Annotated[int, Option(help="Steps per round.")] = 10, device: str = "cpu",
         threads: int = 1) -> None:
    """Measure how long training waits for the loader."""
    models.settings(preset)
    shared = {"preset": preset, "batch": batch, "device": device, "threads": threads, "work": work, "units": 2,
              "unit_steps": steps}
    kinds = [{"cached": cached, "workers": workers} for cached in (False, True) for workers in WORKERS]
    alone = Contender("alone", "benchmarks.loader", shared | {"kinds": kinds})
    runs = [Contender("in a run", "benchmarks.loader", shared | kind | {"kinds": [kind], "trains": True})
            for kind in kinds]
    turns.race([alone], rounds=1, units=len(kinds) - 1, threads=threads)
    turns.race(runs, rounds=rounds, units=1, threads=threads, together=False)
    table = Table("loader", "workers", "ms, alone", "ms, in a run", "ms, the run's step", "share of the run",
                  title=f"{preset}, {batch} rows a step, {work}, {device}, {len(os.sched_getaffinity(0))} cores")
    for run, alone_s in zip(runs, alone.facts["waited_s"], strict=True):
        waited_s, run_s = median(run.facts["waited_s"]), median(run.rounds)
        table.add_row("features" if run.case["cached"] else "pixels", str(run.case["workers"]),
                      *(f"{1e3 * seconds / steps:.1f}" for seconds in (alone_s, waited_s, run_s)),
                      f"{waited_s / run_s:.1%}")
    script.show(table)


def contender(case: dict[str, Any], turn: Turn) -> None:
    """Measure how long training waits for each kind of loader. This function runs in the process of one contender."""
    torch.set_num_threads(case["threads"])
    turn.facts["waited_s"] = []
    for kind in case["kinds"]:
        bench = Bench(case | kind)
        steps = Steps(turn, case["unit_steps"], trains=case.get("trains", False))
        setattr(phases, "stream", partial(waiting, stream, steps))  # noqa: B010
        with TemporaryDirectory() as folder, suppress(Ended):
            bench.train(*models.onediff(bench.config, case["device"]), Path(folder), steps)


class Steps:
    """A callback that training calls after every step, to collect the seconds that training waited for the loader.

    One unit of work is `num` steps; the first unit is the warm-up.
    """

    def __init__(self, turn: Turn, num: int, *, trains: bool) -> None:
        self.turn, self.num, self.trains, self.done, self.waited_s = turn, num, trains, 0, 0.0

    def __call__(self, *_: Any) -> None:
        self.done += 1
        if self.done % self.num:
            return
        if self.done > self.num:
            self.turn.facts["waited_s"].append(self.waited_s)
        if self.trains or self.done > self.num:
            self.turn()
            if not self.trains:
                raise Ended
        self.waited_s = 0.0


def waiting(stream: Callable[..., Iterator[list[Batch]]], steps: Steps, *args: Any,
            **kwargs: Any) -> Iterator[list[Batch]]:
    """Yield the batches of a loader stream, and add the seconds spent waiting for each batch to `steps.waited_s`.

    Without training, this function calls `steps` itself instead of yielding a batch.
    """
    batches = stream(*args, **kwargs)
    while True:
        start = time.perf_counter()
        step = next(batches)
        steps.waited_s += time.perf_counter() - start
        if steps.trains:
            yield step
        else:
            steps()


if __name__ == "__main__":
    turns.run_script(main, contender)
