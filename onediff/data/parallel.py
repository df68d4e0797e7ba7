"""Runs a function on many items in parallel, in local processes or on a Ray cluster, with identical results.

All machines of a cluster need the same version of this package, and the project folder under the same path (shared
storage), because items may contain file paths relative to the project folder. Each worker computes with one thread on
both engines, because floating-point sums that are split over threads round differently.
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

AHEAD = 4  # number of chunks that each process may compute before the caller needs their results
MAX_BLOCKS = 4096  # largest number of blocks into which Ray Data divides the items
CONNECT_TIMEOUT_S = 10  # timeout in seconds for the connection to the head node of a Ray cluster

_worker: Callable[[Any], Any] | None = None
_refusal: Exception | None = None  # the error that prevented this process from creating its worker function, or None


def spread(make: Callable[[], Worker[Item, Result]], items: Iterable[Item], runtime: Runtime, *,
           chunk: int = 1, num_gpus: float = 0) -> Iterator[Result]:
    """Call a worker function for every item, in parallel processes, and yield the results in the order of the items.

    `make` is called once in each process and returns the worker function, so this function can hold a loaded model.
    `chunk` is the number of items that are sent to a process at once. `num_gpus` is the fraction of a GPU that one
    process uses, if the machine has GPUs. Only a few chunks are computed before the caller needs their results, so
    memory use does not grow with the number of items.

    Raises the ValueError or OSError that the worker function raised. Raises ChildProcessError if a local process is
    killed; a Ray cluster replaces a killed process.
    """
    run = _on_cluster if runtime.engine == "ray" else _in_processes
    return run(make, items, runtime, chunk=chunk, num_gpus=num_gpus)


def _chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    rest = iter(items)
    while chunk := list(itertools.islice(rest, size)):
        yield chunk


def _start(make: Callable[[], Worker[Any, Any]]) -> None:
    """Create the worker function of this process. If `make` fails, keep the error so that `_work` can return it."""
    global _worker, _refusal
    os.environ["OMP_NUM_THREADS"] = "1"
    if "torch" in sys.modules:
        # A forked process lacks the threads of torch, so with more than one thread, torch would wait forever.
        sys.modules["torch"].set_num_threads(1)
    _worker = _refusal = None
    try:
        _worker = make()
    except (ValueError, OSError) as error:
        _refusal = error


def _work(chunk: list[Any]) -> tuple[list[Any], Exception | None]:
    """Call the worker function for each item of the chunk until a ValueError or OSError occurs.

    Return (results before the error, the error), or (all results, None) if no error occurred.
    """
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
        raise ChildProcessError("a worker process was killed or could not start; if the machine ran out of memory, "
                                f"set workers below {len(gpus)} in runtime.yaml") from None
    finally:
        if not finished:
            # After an error or an interrupt, the remaining results are not needed, so stop the workers at once.
            for process in multiprocessing.active_children():
                process.kill()
        pool.shutdown(cancel_futures=True)


def _visible_gpus(runtime: Runtime, num_gpus: float) -> list[str | None]:
    """Return, for each worker process, the name of the only GPU that it may use, or None for no restriction."""
    if not num_gpus or runtime.device == "cpu" or not os.path.exists("/dev/nvidia0"):
        return [None] * runtime.num_workers
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(runtime.gpus)))
    names = visible.split(",")[: runtime.gpus]
    each = max(1, min(int(1 / num_gpus), -(-runtime.num_workers // len(names))))
    return [name for name in names for _ in range(each)]


def _start_process(make: Callable[[], Worker[Any, Any]], parent: int, gpus: list[str | None], num_started: Any) -> None:
    """Initialize this worker process: set how it handles signals, choose its GPU and create its worker function.

    The process ignores Ctrl-C and the closing of the terminal, because the parent process receives these signals too
    and then stops the worker processes.
    """
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
    """Exit this process when the process `parent` has died, because otherwise it would wait for work forever."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)



def _on_cluster(make: Callable[[], Worker[Item, Result]], items: Iterable[Item], runtime: Runtime, *,
                chunk: int, num_gpus: float) -> Iterator[Result]:
    """Yield the results that `spread` describes, computed on a Ray cluster.

    All items are sent to the cluster before the first result is computed, so they must be small, such as paths.
    """
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
    """A Ray actor that calls one worker function; it returns a ValueError or OSError instead of raising it."""

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
            f"{folder} does not exist on {os.uname().nodename}, a machine of the Ray cluster: put the project folder "
            "on storage that all machines of the cluster mount under the same path") from None
    worker: Worker[Any, Any] = pickle.loads(make)()
    return worker


def _connect(runtime: Runtime) -> None:
    """Connect this process to the Ray cluster, unless it is connected already.

    Raises ValueError if Ray is not installed, and ConnectionError if no Ray cluster answers at `ray_address` of
    runtime.yaml.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Hide the errors that Ray's background processes log, because our code also receives them as exceptions.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import ray
    except ModuleNotFoundError:
        raise ValueError("runtime.yaml: engine 'ray' needs Ray, which is not installed: run pip install -e "
                         "\".[ray]\", or set engine to local") from None
    if ray.is_initialized():
        return
    address = runtime.ray_address
    try:
        if address is not None and address != "auto":
            # We test the connection ourselves, because Ray waits for minutes if no process listens at the address.
            host, _, port = address.rpartition(":")
            if "/" in host or not host or not port.isdecimal():
                raise ValueError("the address must be auto, or <host>:<port> of the head node of the Ray cluster")
            socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
        ray.init(address=address or "local", num_cpus=None if address else runtime.num_workers,
                 include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConnectionError(f"runtime.yaml: ray_address {address}: no Ray cluster answers ({reason}); start one "
                              "with 'ray start --head', or remove ray_address to use only this machine") from None
