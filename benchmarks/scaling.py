"""Steps per second on one process and on two, through DeepSpeed's launcher, at ZeRO 0 to 3; one table.

    python -m benchmarks.scaling                       # tiny, tune on pairs, 32 rows a step whatever the processes
    python -m benchmarks.scaling --processes 1 --processes 4 --zero 2

Each case is a run of `fit` started as a stage is (onediff.train.launch.dispatch), one thread a process, over gloo on
a CPU and NCCL on GPUs. The global batch stays, so two processes share its rows: efficiency is steps/s over those of one
process with ZeRO 0, divided by the number of processes. The cases take turns, step by step (benchmarks/turns.py).
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

FOLDER = "BENCHMARK_FOLDER"  # the folder of the run, for its ranks


def main(preset: Annotated[str, Option(help=f"One of {', '.join(models.PRESETS)}.")] = "tiny",
         processes: Annotated[list[int] | None, Option(help="Numbers of processes; 1 and 2 without.")] = None,
         zero: Annotated[list[int] | None, Option(help="ZeRO levels of several processes; all without.")] = None,
         batch: int = 32, rounds: int = 4, units: Annotated[int, Option(help="Steps in a round.")] = 3,
         device: str = "cpu") -> None:
    """Speeds of one process and of several."""
    models.settings(preset)
    shared = {"preset": preset, "batch": batch, "device": device, "steps": 1 + rounds * units, "units": units,
              "work": "pairs", "cached": True, "masked": True}
    contenders = [Contender(f"{number} process{'es' * (number > 1)}, ZeRO {level}", "benchmarks.scaling",
                            shared | {"processes": number, "zero": level})
                  for number in processes or (1, 2) for level in ((0,) if number == 1 else zero or (0, 1, 2, 3))]
    turns.race(contenders, rounds=rounds, units=units, threads=1, together=device == "cpu")
    table = Table("contender", "steps/s", "rank 0's peak GiB", "times one process", "efficiency",
                  title=f"{preset}, {batch} rows a step, {device}, a thread each, {len(os.sched_getaffinity(0))} cores")
    for contender in contenders:
        faster = turns.ratios(contender, contenders[0])
        table.add_row(contender.name, f"{units / median(contender.rounds):.2f}",
                      f"{contender.facts['memory_gib']:.2f}", turns.with_range(faster),
                      f"{median(faster) / contender.case['processes']:.0%}")
    script.show(table)


def contender(case: dict[str, Any], turn: Turn) -> None:
    """The process that a stage would be, or, started by the launcher, one of its ranks."""
    with TemporaryDirectory() as folder:
        if "LOCAL_RANK" in os.environ or case["processes"] == 1:
            train(case, turn, Path(os.environ.get(FOLDER, folder)))
        else:
            os.environ[FOLDER] = folder
            dispatch.launch_ranks("tune", runtime_of(case), Path(folder), module="benchmarks.scaling")


def train(case: dict[str, Any], turn: Turn, folder: Path) -> None:
    """Exactly as many steps as there are turns, so that all ranks end together."""
    def log(*_: Any) -> None:
        with suppress(Ended):
            turn()

    torch.set_num_threads(1)
    bench = Bench(case)
    turn.facts["rows"] = case["batch"] * case["units"]
    bench.train(*models.onediff(bench.config, case["device"]), folder, log)
    (folder / "run.json").write_text("{}")  # by which the launcher knows the run as finished


if __name__ == "__main__":
    turns.run_script(main, contender)
