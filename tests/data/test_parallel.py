from __future__ import annotations

import functools
import operator
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from onediff.config import Config, Runtime
from onediff.data.parallel import AHEAD, spread

ROOT = Path(__file__).parents[2]
LOCAL = Runtime(workers=3)
RAY = Runtime(workers=3, engine="ray")


def adder(number: int) -> Callable[[int], int]:
    return functools.partial(operator.add, number)


def process_id() -> Callable[[int], int]:
    pid = os.getpid()
    return lambda item: pid


def reader() -> Callable[[str], str]:
    return lambda name: Path(name).read_text()


def divider() -> Callable[[int], int]:
    def divide(item: int) -> int:
        if item == 7:
            raise ValueError("item 7: must not be divided; remove it")
        return item

    return divide


def toucher(folder: str) -> Callable[[int], int]:
    def touch(item: int) -> int:
        (Path(folder) / str(item)).touch()
        return item

    return touch


def killer() -> Callable[[int], int]:
    return lambda item: os.kill(os.getpid(), signal.SIGKILL) or item if item == 3 else item


def refuser() -> Callable[[int], int]:
    raise FileNotFoundError("models/clip not found")


def multiplier() -> Callable[[int], float]:
    import torch

    return lambda item: float((torch.full((300, 300), float(item)) @ torch.ones(300, 300))[0, 0])


@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("count", [0, 1, 53])
def test_results_are_in_the_order_of_the_items(count: int, chunk: int) -> None:
    assert list(spread(functools.partial(adder, 5), range(count), LOCAL, chunk=chunk)) == list(range(5, 5 + count))


def test_a_worker_is_created_once_in_each_of_three_processes() -> None:
    pids = list(spread(process_id, range(60), LOCAL, chunk=2))
    assert os.getpid() not in pids
    assert len(set(pids)) <= 3


def test_workers_can_use_torch_after_the_parent_process_has_used_threads_of_torch() -> None:
    import torch

    torch.set_num_threads(2)
    # These operations start threads, which do not exist in a forked child process.
    torch.ones(2000, 2000) @ torch.ones(2000, 2000)
    torch.nn.functional.gelu(torch.ones(4_000_000))
    assert list(spread(multiplier, range(1, 5), LOCAL)) == [300.0, 600.0, 900.0, 1200.0]


def test_an_error_of_a_worker_is_raised_after_the_results_of_earlier_items() -> None:
    results = spread(divider, range(20), LOCAL)
    assert [next(results) for _ in range(7)] == list(range(7))
    with pytest.raises(ValueError, match=r"^item 7: must not be divided; remove it$"):
        next(results)


def test_an_error_during_the_creation_of_a_worker_is_raised_unchanged() -> None:
    with pytest.raises(FileNotFoundError, match=r"^models/clip not found$"):
        list(spread(refuser, range(3), LOCAL))


def test_the_error_for_a_killed_process_contains_a_cure() -> None:
    with pytest.raises(ChildProcessError, match=r"killed or could not start; .* set workers below 3 in runtime.yaml"):
        list(spread(killer, range(20), LOCAL))


def test_processes_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import os, signal, time\n"
        "from onediff.config import Runtime\n"
        "from onediff.data.parallel import spread\n"
        "def make():\n"
        "    return lambda item: (time.sleep(0.05), os.getpid())[1]\n"
        "for number, pid in enumerate(spread(make, range(10_000), Runtime(workers=2))):\n"
        "    print(pid, flush=True)\n"
        "    if number == 20:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n")
    done = subprocess.run([sys.executable, str(program)], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
                          stdout=subprocess.PIPE, text=True, check=False)
    assert done.returncode == -signal.SIGKILL
    pids = {int(line) for line in done.stdout.split()}
    assert len(pids) == 2
    deadline = time.monotonic() + 10
    while running := [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, f"these worker processes still run: {running}"
        time.sleep(0.1)


def test_each_process_sees_only_the_gpu_that_it_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "exists", lambda path: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def visible_devices(num_gpus: float, **runtime: Any) -> list[str]:
        make = functools.partial(functools.partial, _read_visible_devices)
        return list(spread(make, range(40), Runtime(**runtime), num_gpus=num_gpus))

    assert set(visible_devices(1, workers=16, gpus=2)) == {"0", "1"}
    assert set(visible_devices(0.5, workers=16, gpus=1)) == {"0"}
    assert set(visible_devices(1, workers=16, gpus=2, device="cpu")) == {""}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,7")
    assert set(visible_devices(0.5, workers=16, gpus=2)) == {"3", "5"}


def _read_visible_devices(item: int) -> str:
    time.sleep(0.01)
    return os.environ.get("CUDA_VISIBLE_DEVICES", "")


def test_only_a_few_chunks_of_items_are_computed_in_advance(tmp_path: Path) -> None:
    requested: list[int] = []

    def items() -> Iterator[int]:
        for item in range(10_000):
            requested.append(item)
            yield item

    results = spread(functools.partial(toucher, str(tmp_path)), items(), LOCAL, chunk=2)
    assert next(results) == 0
    results.close()  # type: ignore[attr-defined]
    assert len(requested) <= 2 * AHEAD * 3
    assert len(list(tmp_path.iterdir())) <= len(requested)


def test_the_error_for_a_missing_ray_contains_the_command_that_installs_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r'engine \'ray\' needs Ray, which is not installed: run pip install'):
        list(spread(process_id, [1], RAY))


@pytest.mark.parametrize(("address", "reason"), [
    ("127.0.0.1:{port}", "Connection refused"), ("ray://head:10001", "auto, or <host>:<port>"),
    ("head", "auto, or <host>:<port>")])
def test_a_ray_cluster_that_does_not_answer_is_refused_within_15_seconds(address: str, reason: str) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    address = address.format(port=port)
    start = time.monotonic()
    with pytest.raises(ConnectionError, match=rf"ray_address {address}: no Ray .*{reason}.*ray start"):
        list(spread(process_id, [1], Runtime(engine="ray", ray_address=address)))
    assert time.monotonic() - start < 15


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """Start a Ray cluster on this machine, to which tests add nodes. Ray treats each node as a separate machine."""
    cluster_utils = pytest.importorskip("ray.cluster_utils", reason="Ray is not installed: the extra 'ray'")
    import ray

    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal"}
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.slow
def test_a_ray_cluster_gives_the_results_and_errors_of_local_processes(nodes: Any, tmp_path: Path,
                                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    nodes.add_node(num_cpus=1)
    ray = Runtime(engine="ray", ray_address=nodes.address)
    assert list(spread(functools.partial(adder, 5), range(53), ray, chunk=3)) == list(range(5, 58))
    assert list(spread(process_id, [], ray)) == []
    assert len(set(spread(process_id, range(40), ray))) == 2
    results = spread(divider, range(20), ray, chunk=4)
    assert [next(results) for _ in range(7)] == list(range(7))
    with pytest.raises(ValueError, match=r"^item 7: must not be divided; remove it$"):
        next(results)
    with pytest.raises(FileNotFoundError, match="models/clip not found"):
        list(spread(refuser, range(3), ray))
    monkeypatch.chdir(tmp_path)
    Path("relative.txt").write_text("content")
    assert list(spread(reader, ["relative.txt"], ray)) == ["content"]


@pytest.mark.slow
def test_results_of_a_cluster_that_loses_a_node_equal_the_results_of_one_process(nodes: Any, micro: Config) -> None:
    from onediff.data.synthesis.scenes.records import scene_records

    node = nodes.add_node(num_cpus=1)
    nodes.wait_for_nodes()

    def make() -> Callable[[int], list[Any]]:
        return functools.partial(scene_records, micro, "train")

    results = []
    for records in spread(make, range(200), Runtime(engine="ray", ray_address=nodes.address), chunk=4):
        results.append(records)
        if len(results) == 60:
            nodes.remove_node(node, allow_graceful=False)
    assert results == [scene_records(micro, "train", index) for index in range(200)]
