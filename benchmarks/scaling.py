"""Measures training steps per second with one process and with two, at ZeRO levels 0 to 3; one table.

    python -m benchmarks.scaling                       # tiny, tune on pairs, 32 rows per step in every case
    python -m benchmarks.scaling --processes 1 --processes 4 --zero 2

Each case runs `fit`, with one thread per process. DeepSpeed's launcher starts several processes, like in a training
stage (onediff.train.launch.dispatch). They communicate through gloo on a CPU and through NCCL on GPUs. The global batch
has an equal number of rows in all cases; several processes share these rows. Efficiency is the speed-up over one
process with ZeRO 0, divided by the number of processes. The cases take turns after each step (benchmarks/turns.py).
"""

import os
from contextlib import suppress
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
from rich.table import Table
from typer import Option

from benchmarks import models, script, turns
from benchmarks.rows import Bench, runtime_of
from benchmarks.turns import Contender, Ended, Turn
from onediff.train.launch import dispatch

FOLDER = "BENCHMARK_FOLDER"  # The environment variable that passes the folder of the run to all ranks.


def main(preset: Annotated[str, Option(help=f"One of {', '.join(models.PRESETS)}.")] = "tiny",
         processes: Annotated[list[int] | None, Option(help="Number of processes; default: 1 and 2.")] = None,
         zero: Annotated[list[int] | None, Option(help="ZeRO level of several processes; default: 0 to 3.")] = None,
         batch: int = 32, rounds: int = 4, units: Annotated[int, Option(help="Steps per round.")] = 3,
         device: str = "cpu") -> None:
    """Measure the training speed of one process and of several processes."""
    models.settings(preset)
    shared = {"preset": preset, "batch": batch, "device": device, "steps": 1 + rounds * units, "units": units,
              "work": "pairs", "cached": True, "masked": True}
    contenders = [Contender(f"{number} process{'es' * (number > 1)}, ZeRO {level}", "benchmarks.scaling",
                            shared | {"processes": number, "zero": level})
                  for number in processes or (1, 2) for level in ((0,) if number == 1 else zero or (0, 1, 2, 3))]
    turns.race(contenders, rounds=rounds, units=units, threads=1, together=device == "cpu")
    table = Table("contender", "steps/s", "rank 0's peak GiB", "times one process", "efficiency",
                  title=f"{preset}, {batch} rows a step, {device}, 1 thread each, {len(os.sched_getaffinity(0))} cores")
    for contender in contenders:
        faster = turns.ratios(contender, contenders[0])
        table.add_row(contender.name, f"{units / median(contender.rounds):.2f}",
                      f"{contender.facts['memory_gib']:.2f}", turns.with_range(faster),
                      f"{median(faster) / contender.case['processes']:.0%}")
    script.show(table)


def contender(case: dict[str, Any], turn: Turn) -> None:
    """Train in this process if it is a rank or the only process; otherwise start the ranks with the launcher."""
    with TemporaryDirectory() as folder:
        if "LOCAL_RANK" in os.environ or case["processes"] == 1:
            train(case, turn, Path(os.environ.get(FOLDER, folder)))
        else:
            os.environ[FOLDER] = folder
            dispatch.launch_ranks("tune", runtime_of(case), Path(folder), module="benchmarks.scaling")


def train(case: dict[str, Any], turn: Turn, folder: Path) -> None:
    """Train for exactly as many steps as the contender gets turns, so that all ranks end together."""
    def log(*_: Any) -> None:
        with suppress(Ended):
            turn()

    torch.set_num_threads(1)
    bench = Bench(case)
    turn.facts["rows"] = case["batch"] * case["units"]
    bench.train(*models.onediff(bench.config, case["device"]), folder, log)
    (folder / "run.json").write_text("{}")  # The launcher treats the run as finished if run.json exists.


if __name__ == "__main__":
    turns.run_script(main, contender)
