"""Measures the time that the Prefect flow adds to `dvc repro` when all stages are up to date; one line.

    python -m benchmarks.flow_overhead

The flow `retrain` and the command `dvc repro` take turns in the current folder, in which all stages must be up to date.
The start-up times of the Prefect server and of DVC (measured with `dvc version`) are not counted.
"""

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
def measure() -> None:
    flow_s, repro_s = [], []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        state = run_here(stale_stages())
        flow_s.append(time.perf_counter() - start)
        if state.name != "UpToDate":
            sys.exit("benchmarks.flow_overhead: all stages must be up to date; run 'dvc repro' first")
        repro_s.append(_seconds("repro"))
    start_s = median(_seconds("version") for _ in range(ROUNDS))
    num_stages = len(stages(load_params().data))
    added = [(with_flow - alone) / num_stages for with_flow, alone in zip(flow_s, repro_s, strict=True)]
    print(f"{num_stages} stages: flow {median(flow_s) - start_s:.2f} s, dvc repro {median(repro_s) - start_s:.2f} s; "
          f"the flow adds {median(added):+.3f} s per stage ({min(added):+.3f} to {max(added):+.3f})")


def _seconds(command: str) -> float:
    """Run a DVC command and return the duration in seconds."""
    start = time.perf_counter()
    subprocess.run([*DVC, command], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


if __name__ == "__main__":
    with temporary_server():
        measure()
