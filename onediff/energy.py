"""Electric energy of a stretch of work, where the machine counts it: never an estimate.

    used = counter()            # None: this machine has no counter that may be read
    ...
    used()                      # watt-hours since then
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

RAPL = Path("/sys/class/powercap")  # Linux: what the processors' packages count, in microjoules
READ_EVERY_S = 20.0  # a package's counter begins again after a few minutes at full load
_JOULES_PER_WH = 3600.0


def counter(rapl: Path = RAPL) -> Callable[[], float] | None:
    """Begins to count, and gives the function that tells the watt-hours used since: of all processors and GPUs that
    count, whoever used them. None if none does.
    """
    meters = [*_processors(rapl), *_gpus()]
    if not meters:
        return None
    total, lock = [0.0], threading.Lock()

    def read() -> float:
        with lock:
            total[0] += sum(meter() for meter in meters)
            return total[0] / _JOULES_PER_WH

    def read_often() -> None:
        while True:
            threading.Event().wait(READ_EVERY_S)
            read()

    read()
    total[0] = 0.0
    threading.Thread(target=read_often, name="energy", daemon=True).start()
    return read


def _processors(rapl: Path) -> list[Callable[[], float]]:
    """One meter of joules for each processor package; reading them may need root."""
    meters = []
    for package in sorted(rapl.glob("intel-rapl:*")):  # AMD's are called so too
        if package.name.count(":") == 1 and os.access(package / "energy_uj", os.R_OK):
            wraps_at = _number(package / "max_energy_range_uj")
            meters.append(_meter(partial(_number, package / "energy_uj"), 1e6, wraps_at))
    return meters


def _gpus() -> list[Callable[[], float]]:
    """One meter of joules for each NVIDIA GPU that this process may use, if nvidia-ml-py is installed."""
    try:
        import pynvml
    except ImportError:
        return []
    meters: list[Callable[[], float]] = []
    with suppress(pynvml.NVMLError):  # no driver, or a GPU that does not count
        pynvml.nvmlInit()
        chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = range(pynvml.nvmlDeviceGetCount()) if chosen is None else [name for name in chosen.split(",") if name]
        for name in names:
            handle = (pynvml.nvmlDeviceGetHandleByIndex(int(name)) if str(name).isdigit()
                      else pynvml.nvmlDeviceGetHandleByUUID(str(name)))
            pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
            meters.append(_meter(partial(pynvml.nvmlDeviceGetTotalEnergyConsumption, handle), 1e3))
    return meters


def _number(path: Path) -> int:
    return int(path.read_text())


def _meter(read: Callable[[], int], per_joule: float, wraps_at: int = 2**64) -> Callable[[], float]:
    """Joules since it was asked last."""
    last = [read()]

    def since() -> float:
        now = read()
        used, last[0] = (now - last[0]) % wraps_at, now
        return used / per_joule

    return since

