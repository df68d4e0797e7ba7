"""One function between work and where it runs: processes of this machine, or a Ray cluster. Results never differ.

A cluster's machines need this package in the same version and the project's folder under the same path (shared
storage): items may name files relative to it. Each worker computes with one thread on either engine, because sums that
are split over threads round differently.
"""

from __future__ import annotations

import functools
import itertools
import logging
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, Any, TypeVar

from onediff.config import Runtime

if TYPE_CHECKING:
    import pyarrow as pa

Item = TypeVar("Item")
Result = TypeVar("Result")
Worker = Callable[[Item], Result]

AHEAD = 4  # chunks that each process may be ahead of whoever takes the results
MAX_BLOCKS = 4096  # parts of the items that a cluster hands out
CONNECT_TIMEOUT_S = 10  # for the head of a cluster

_worker: Callable[[Any], Any] | None = None
_refusal: Exception | None = None  # why the worker could not be made


def spread(make: Callable[[], Worker[Item, Result]], items: Iterable[Item], runtime: Runtime, *,
           chunk: int = 1, num_gpus: float = 0) -> Iterator[Result]:
    """make()(item) for every item, in order. `make` runs once in each process, so that a worker can hold a model.

    `chunk` items travel together; `num_gpus` is what one worker takes of a GPU where there are any. Results come as
    they are ready, a few chunks ahead of whoever takes them, so that memory stays flat. An error of a worker is raised
    here as it was there; a process that was killed is replaced by a cluster and is a ChildProcessError locally.
    """
    run = _on_cluster if runtime.engine == "ray" else _in_processes
    return run(make, items, runtime, chunk=chunk, num_gpus=num_gpus)


def _chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    rest = iter(items)
    while chunk := list(itertools.islice(rest, size)):
        yield chunk


# --- in each worker process -------------------------------------------------------------------------------------------


def _start(make: Callable[[], Worker[Any, Any]]) -> None:
    global _worker, _refusal
    os.environ["OMP_NUM_THREADS"] = "1"
    if "torch" in sys.modules:  # forked: the threads that torch had in the parent are not here, and would be waited for
        sys.modules["torch"].set_num_threads(1)
    _worker = _refusal = None
    try:
        _worker = make()
    except (ValueError, OSError) as error:
        _refusal = error


def _work(chunk: list[Any]) -> tuple[list[Any], Exception | None]:
    """The results before the first error of the world, and that error."""
    if _refusal is not None:
        return [], _refusal
    assert _worker is not None, "a process of the pool has been started"
    results: list[Any] = []
    try:
        results.extend(map(_worker, chunk))
    except (ValueError, OSError) as error:
        return results, error
    return results, None


def _results(outcome: tuple[list[Any], Exception | None]) -> Iterator[Any]:
    results, error = outcome
    yield from results
    if error is not None:
        raise error


# --- this machine -----------------------------------------------------------------------------------------------------


def _in_processes(make: Callable[[], Worker[Item, Result]], items: Iterable[Item], runtime: Runtime, *,
                  chunk: int, num_gpus: float) -> Iterator[Result]:
    gpus, num_started = _visible_gpus(runtime, num_gpus), multiprocessing.Value("i", 0)
    waiting: deque[Future[tuple[list[Any], Exception | None]]] = deque()
    start = functools.partial(_start_process, make, os.getpid(), gpus, num_started)
    pool, finished = ProcessPoolExecutor(len(gpus), initializer=start), False
    try:
        for part in _chunks(items, chunk):
            waiting.append(pool.submit(_work, part))
            if len(waiting) == AHEAD * len(gpus):
                yield from _results(waiting.popleft().result())
        while waiting:
            yield from _results(waiting.popleft().result())
        finished = True
    except BrokenProcessPool:
        raise ChildProcessError("a worker process was killed or could not start: where memory is short, "
                                f"set workers below {len(gpus)} in runtime.yaml") from None
    finally:
        if not finished:  # after an error or an interrupt the remaining results are not needed
            for process in multiprocessing.active_children():
                process.kill()
        pool.shutdown(cancel_futures=True)


def _visible_gpus(runtime: Runtime, num_gpus: float) -> list[str | None]:
    """The GPU that each process may see; None: it sees them all, or there are none."""
    if not num_gpus or runtime.device == "cpu" or not os.path.exists("/dev/nvidia0"):
        return [None] * runtime.num_workers
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(runtime.gpus)))
    names = visible.split(",")[: runtime.gpus]
    each = max(1, min(int(1 / num_gpus), -(-runtime.num_workers // len(names))))
    return [name for name in names for _ in range(each)]


def _start_process(make: Callable[[], Worker[Any, Any]], parent: int, gpus: list[str | None], num_started: Any) -> None:
    """Ctrl-C and a closed terminal reach the parent as well, which then ends its processes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    with num_started.get_lock():
        gpu = gpus[num_started.value % len(gpus)]
        num_started.value += 1
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    _start(make)


def _end_with(parent: int) -> None:
    """A process of the pool would wait forever for work from a parent that was killed."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


# --- a Ray cluster ----------------------------------------------------------------------------------------------------


def _on_cluster(make: Callable[[], Worker[Item, Result]], items: Iterable[Item], runtime: Runtime, *,
                chunk: int, num_gpus: float) -> Iterator[Result]:
    """The items themselves are all put into the cluster first: keep them small, such as numbers and paths."""
    packed = [pickle.dumps(part) for part in _chunks(items, chunk)]
    if not packed:
        return
    _connect(runtime)
    import ray
    from ray.data import ActorPoolStrategy

    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    resources = ray.cluster_resources()
    count = min(runtime.workers or int(resources["CPU"]), len(packed))
    table = ray.data.from_items([{"part": part} for part in packed], override_num_blocks=min(len(packed), MAX_BLOCKS))
    outcomes = table.map_batches(
        _Actor, fn_constructor_args=(ray.cloudpickle.dumps(make), os.getcwd()), batch_size=1, batch_format="pyarrow",
        compute=ActorPoolStrategy(size=count), num_cpus=1, num_gpus=num_gpus if resources.get("GPU") else 0)
    for row in outcomes.iter_rows():
        yield from _results(pickle.loads(row["results"]))


class _Actor:
    """Holds the worker on a machine of the cluster; an error of the world comes back as a value."""

    def __init__(self, make: bytes, folder: str) -> None:
        _start(functools.partial(_make_in, folder, make))

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        import pyarrow as pa

        for part in table.column("part").to_pylist():
            outcome = pickle.dumps(_work(pickle.loads(part)))
            yield pa.table({"results": pa.array([outcome], pa.large_binary())})


def _make_in(folder: str, make: bytes) -> Worker[Any, Any]:
    try:
        os.chdir(folder)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{folder} not found on {os.uname().nodename}, a machine of the Ray cluster: the project's folder must "
            "be on storage that all of them share, under the same path") from None
    worker: Worker[Any, Any] = pickle.loads(make)()
    return worker


def _connect(runtime: Runtime) -> None:
    """Joins the cluster once per process. Raises ValueError without Ray, ConnectionError if nobody answers."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # what matters comes back as an exception
    try:
        import ray
    except ModuleNotFoundError:
        raise ValueError("runtime.yaml: engine 'ray' needs Ray: pip install -e \".[ray]\", "
                         "or set engine to local") from None
    if ray.is_initialized():
        return
    address = runtime.ray_address
    try:
        if address is not None and address != "auto":  # Ray itself would wait for minutes if nothing listens there
            host, _, port = address.rpartition(":")
            if "/" in host or not host or not port.isdecimal():
                raise ValueError("must be auto or <host>:<port> of the head of a cluster that this machine belongs to")
            socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
        ray.init(address=address or "local", num_cpus=None if address else runtime.num_workers,
                 include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConnectionError(f"runtime.yaml: ray_address {address}: no Ray cluster answers ({reason}); start one "
                              "with 'ray start --head', or leave ray_address out for this machine alone") from None
