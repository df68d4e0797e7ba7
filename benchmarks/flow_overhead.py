"""What the flow adds to `dvc repro` when all stages are up to date; one line.  python -m benchmarks.flow_overhead

The stages of the flow `retrain` and `dvc repro` take turns in this folder, which must be up to date. Start-up is left
out: of Prefect's server, and of DVC (`dvc version`).
"""

from __future__ import annotations

import subprocess
import sys
import time
from statistics import median

from prefect import flow

from flows.pipeline import stages, stale_stages
from flows.processes import DVC
from flows.retrain import run_here
from flows.server import temporary_server
from onediff.config import load_params

ROUNDS = 5


@flow
def measured() -> tuple[list[float], list[float], float]:
    ours, theirs = [], []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        state = run_here(stale_stages())
        ours.append(time.perf_counter() - start)
        if state.name != "UpToDate":
            sys.exit("onediff: this folder is not up to date: 'dvc repro' first")
        theirs.append(_seconds("repro"))
    return ours, theirs, median(_seconds("version") for _ in range(ROUNDS))


def _seconds(command: str) -> float:
    start = time.perf_counter()
    subprocess.run([*DVC, command], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


if __name__ == "__main__":
    with temporary_server():
        ours, theirs, start = measured()
    number = len(stages(load_params().data))
    more = [(a - start) - (b - start) for a, b in zip(ours, theirs, strict=True)]
    print(f"{number} stages: flow {median(ours) - start:.2f} s, dvc repro {median(theirs) - start:.2f} s; "
          f"the flow adds {median(more) / number:+.3f} s a stage "
          f"({min(more) / number:+.3f} to {max(more) / number:+.3f})")
