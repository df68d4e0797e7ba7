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
    import ray.data

Item = TypeVar("Item")
Result = TypeVar("Result")
Worker = Callable[[Item], Result]

AHEAD = 4  # chunks that each process may be ahead of whoever takes the results
MAX_BLOCKS = 4096  # parts of the items that a cluster hands out
KNOCK_S = 10  # how long a cluster's head may take to answer

_worker: Callable[[Any], Any] | None = None
_refusal: Exception | None = None  # why the worker could not be made


def spread(make: Callable[[], Worker[Item, Result]], items: Iterable[Item], runtime: Runtime, *,
           chunk: int = 1, num_gpus: float = 0) -> Iterator[Result]:
    """make()(item) for every item, in order. `make` runs once in each process, so that a worker can hold a model.

    `chunk` items travel together; `num_gpus` is what one worker takes of a GPU where there are any. Results come as
    they are ready, a few chunks ahead of whoever takes them, so that memory stays flat. An error of a worker is raised
    here as it was there; a process that was killed is replaced by a cluster and is a ChildProcessError locally.
    """
    if runtime.engine == "ray":
        yield from _on_cluster(make, items, runtime, chunk=chunk, num_gpus=num_gpus)
    else:
        yield from _here(make, items, runtime, chunk=chunk, num_gpus=num_gpus)


# --- this machine -----------------------------------------------------------------------------------------------------


def _here(make: Callable[[], Worker[Item, Result]], items: Iterable[Item], runtime: Runtime, *,
          chunk: int, num_gpus: float) -> Iterator[Result]:
    seats = _seats(runtime, num_gpus)
    count, taken = len(seats), multiprocessing.Value("i", 0)
    waiting: deque[Future[list[Result]]] = deque()
    start = functools.partial(_start_here, make, os.getpid(), seats, taken)
    pool, finished = ProcessPoolExecutor(count, initializer=start), False
    try:
        for part in _parts(items, chunk):
            waiting.append(pool.submit(_call, part))
            if len(waiting) == AHEAD * count:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
        finished = True
    except BrokenProcessPool:
        raise ChildProcessError("a worker process was killed or could not start: where memory is short, "
                                f"set workers below {count} in runtime.yaml") from None
    finally:
        if not finished:  # after an error or an interrupt the remaining results are not needed
            for process in multiprocessing.active_children():
                process.kill()
        pool.shutdown(cancel_futures=True)


def _parts(items: Iterable[Item], chunk: int) -> Iterator[list[Item]]:
    rest = iter(items)
    while part := list(itertools.islice(rest, chunk)):
        yield part


def _seats(runtime: Runtime, num_gpus: float) -> list[str | None]:
    """The GPU that each process may see; None: it sees them all, or there are none."""
    if not num_gpus or runtime.device == "cpu" or not os.path.exists("/dev/nvidia0"):
        return [None] * runtime.num_workers
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = (given.split(",") if given else [str(number) for number in range(runtime.gpus)])[: runtime.gpus]
    each = max(1, min(int(1 / num_gpus), -(-runtime.num_workers // len(names))))
    return [name for name in names for _ in range(each)]


def _start_here(make: Callable[[], Worker[Any, Any]], parent: int, seats: list[str | None], taken: Any) -> None:
    """Ctrl-C and a closed terminal reach the parent as well, which then ends its processes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    with taken.get_lock():
        seat = seats[taken.value % len(seats)]
        taken.value += 1
    if seat is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = seat
    _start(make)


def _end_with(parent: int) -> None:
    """A process of the pool would wait forever for work from a parent that was killed."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


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


def _call(part: list[Any]) -> list[Any]:
    return [_call_one(item) for item in part]


def _call_one(item: Any) -> Any:
    if _refusal is not None:
        raise _refusal
    assert _worker is not None, "a process of the pool has been started"
    return _worker(item)


# --- a Ray cluster ----------------------------------------------------------------------------------------------------


def _on_cluster(make: Callable[[], Worker[Item, Result]], items: Iterable[Item], runtime: Runtime, *,
                chunk: int, num_gpus: float) -> Iterator[Result]:
    """The items themselves are all put into the cluster first: keep them small, such as numbers and paths."""
    packed = [pickle.dumps(part) for part in _parts(items, chunk)]
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
    there = ray.cluster_resources()
    count = min(runtime.workers or int(there["CPU"]), len(packed))
    table = ray.data.from_items([{"part": part} for part in packed], override_num_blocks=min(len(packed), MAX_BLOCKS))
    done = table.map_batches(
        _Actor, fn_constructor_args=(ray.cloudpickle.dumps(make), os.getcwd()), batch_size=1, batch_format="pyarrow",
        compute=ActorPoolStrategy(size=count), num_cpus=1, num_gpus=num_gpus if there.get("GPU") else 0)
    yield from _results(done)


def _results(done: ray.data.Dataset) -> Iterator[Any]:
    for row in done.iter_rows():
        results, error = pickle.loads(row["results"])
        yield from results
        if error is not None:
            raise error


class _Actor:
    """What holds the worker on a machine of the cluster; an error of the world comes back as a value."""

    def __init__(self, make: bytes, folder: str) -> None:
        self.lost: FileNotFoundError | None = None
        try:
            os.chdir(folder)
        except FileNotFoundError:
            self.lost = FileNotFoundError(
                f"{folder} not found on {os.uname().nodename}, a machine of the Ray cluster: the project's folder must "
                "be on storage that all of them share, under the same path")
        else:
            _start(pickle.loads(make))

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        import pyarrow as pa

        for part in table.column("part").to_pylist():
            results: list[Any] = []
            error: Exception | None = self.lost
            try:
                results.extend(map(_call_one, pickle.loads(part) if error is None else ()))
            except (ValueError, OSError) as raised:
                error = raised
            yield pa.table({"results": pa.array([pickle.dumps((results, error))], pa.large_binary())})


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
        _knock(address)
        ray.init(address=address or "local", num_cpus=None if address else runtime.num_workers,
                 include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConnectionError(f"runtime.yaml: ray_address {address}: no Ray cluster answers ({reason}); start one "
                              "with 'ray start --head', or leave ray_address out for this machine alone") from None


def _knock(address: str | None) -> None:
    """Whether anybody listens at host:port; Ray itself would wait for minutes."""
    if address is None or address == "auto":
        return
    host, _, port = address.rpartition(":")
    if "/" in host or not host or not port.isdecimal():
        raise ValueError("must be auto or <host>:<port> of the head of a cluster that this machine belongs to")
    socket.create_connection((host, int(port)), timeout=KNOCK_S).close()
