"""Measures training steps of `tune` with and without the OpenMP settings of onediff, on an idle and on a busy machine.

    python -m benchmarks.busy                  # 200 steps of each contender, one thread for each core
    python -m benchmarks.busy --steps 20 --rounds 2

Both contenders run equal steps of presets/tiny.yaml on generated pairs. They take turns after each step, and each runs
in a separate process. The ratio is the time with the settings divided by the time without them, so a ratio below 1
means that the settings make training faster. On the busy machine, another process computes on one thread.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Annotated

from rich.table import Table
from typer import Option

from benchmarks import script, turns
from benchmarks.train_step import BATCH, KINDS
from benchmarks.turns import Contender

# "without" sets the default values of GNU OpenMP, because onediff keeps the variables that are already set.
SETTINGS = {"with": {key: os.environ[key] for key in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT") if key in os.environ},
            "without": {"OMP_WAIT_POLICY": "", "GOMP_SPINCOUNT": "300000"}}


def main(steps: Annotated[int, Option(help="Number of steps of each contender on each machine.")] = 200,
         rounds: int = 10, threads: int = len(os.sched_getaffinity(0)), batch: int = BATCH["tiny"]) -> None:
    """Measure training steps with and without the OpenMP settings of onediff."""
    if steps % rounds:
        raise ValueError(f"--steps {steps}: must be a multiple of --rounds {rounds}; change one of these two options")
    table = Table("machine", "settings", "seconds a step", "with / without, by round", "times quiet",
                  title=f"tiny, tune, {steps} steps of {batch} rows, {threads} threads, {os.cpu_count()} cores")
    case = {"preset": "tiny", "work": "pairs", "units": 1, "batch": batch, "device": "cpu", "threads": threads,
            **KINDS["OneDiff, as preset"]}
    quiet_s: dict[str, float] = {}
    for machine, load in (("quiet", nullcontext()), ("beside a busy core", busy_core())):
        contenders = [Contender(name, "benchmarks.train_step", case, environment=values)
                      for name, values in SETTINGS.items()]
        with load:
            turns.race(contenders, rounds=rounds, units=steps // rounds, threads=threads)
        for contender in contenders:
            total_s = sum(contender.rounds)
            quiet_s.setdefault(contender.name, total_s)
            table.add_row(machine, contender.name, f"{total_s / steps:.3f}",
                          _ratio(*contenders) if contender is contenders[0] else "",
                          f"{total_s / quiet_s[contender.name]:.2f}")
        table.add_section()
    script.show(table)


def _ratio(policy: Contender, default: Contender) -> str:
    """Format the time with the settings divided by the time without: over all rounds, and its median and range."""
    by_round = [with_s / without_s for with_s, without_s in zip(policy.rounds, default.rounds, strict=True)]
    return f"{sum(policy.rounds) / sum(default.rounds):.3f} in all, median {turns.with_range(by_round, '.3f')}"


@contextmanager
def busy_core() -> Iterator[None]:
    """Keep one core busy with another process during the `with` block."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    script.main(main)
