"""Tests of training on two nodes, which are two network namespaces of this machine."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from onediff.config import Config, load_params
from onediff.data.record import Record, write_shards
from onediff.train.status import read_status

ROOT = Path(__file__).parents[2]
STEPS = 40
ADDRESSES = ("10.211.7.1", "10.211.7.2")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


class Nodes:
    """Two hosts, each with a network interface and a project folder; both use one scratch folder as shared storage."""

    def __init__(self, shared: Path, params: Path) -> None:
        self.names = [f"onediff{os.getpid()}n{rank}" for rank in (0, 1)]
        self.links = [f"od{os.getpid() % 100000}n{rank}" for rank in (0, 1)]
        self.folders = [shared / f"node-{rank}" for rank in (0, 1)]
        self.scratch = shared / "scratch"
        for folder in self.folders:
            (folder / "data").mkdir(parents=True)
            (folder / "presets").symlink_to(ROOT / "presets")
            (folder / "data/diffcap").symlink_to(shared / "diffcap")
            shutil.copy(params, folder / "params.yaml")

    def connect(self) -> None:
        """Create both network namespaces and a virtual cable between them."""
        for name in self.names:
            ip("netns", "add", name)
        ip("link", "add", self.links[0], "netns", self.names[0], "type", "veth", "peer", "name", self.links[1],
           "netns", self.names[1])
        for name, link, address in zip(self.names, self.links, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", link)
            for device in ("lo", link):
                ip("-n", name, "link", "set", device, "up")

    def disconnect(self) -> None:
        for name in self.names:
            self.kill(name)
            subprocess.run(["ip", "netns", "delete", name], check=False)

    def plug(self, state: str) -> None:
        """Connect (`up`) or disconnect (`down`) the network of the second node."""
        ip("-n", self.names[1], "link", "set", self.links[1], state)

    def kill(self, name: str) -> None:
        """Kill all processes in a network namespace."""
        for pid in subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True,
                                  check=False).stdout.split():
            os.kill(int(pid), signal.SIGKILL)

    def start(self, rank: int) -> subprocess.Popen[str]:
        return stage(self.folders[rank], self.scratch, "ip", "netns", "exec", self.names[rank],
                     ONEDIFF_LAUNCHER="deepspeed", ONEDIFF_NODES="2", ONEDIFF_NODE_RANK=str(rank),
                     ONEDIFF_MASTER_ADDR=ADDRESSES[0], GLOO_SOCKET_IFNAME=self.links[rank], DEEPSPEED_TIMEOUT="1")

    def run(self) -> list[str]:
        """Run the stage on both nodes until it ends, and return the output of each node."""
        return [finished(process) for process in [self.start(rank) for rank in (0, 1)]]

    @property
    def run_folder(self) -> Path:
        return next(self.scratch.glob("align-*"))


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def stage(folder: Path, scratch: Path, *prefix: str, **environment: str) -> subprocess.Popen[str]:
    """Start the stage `align` in a project folder; `prefix` is the command that runs the stage in a namespace."""
    variables = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    variables |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ONEDIFF_DEVICE": "cpu",
                  "ONEDIFF_SCRATCH": str(scratch), "ONEDIFF_CHECKPOINT_EVERY_S": "0.05"}
    return subprocess.Popen([*prefix, sys.executable, "-m", "onediff.stages.align"], cwd=folder, text=True,
                            env=variables | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finished(process: subprocess.Popen[str]) -> str:
    """Wait until a process ends, check that it ended without an error, and return its output."""
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-3000:]
    return output


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "data/models/align/model.safetensors")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with DiffCap of a few scenes and with the micro preset, changed to more steps."""
    from onediff.data.synthesis.scenes.records import scene_records

    folder = tmp_path_factory.mktemp("shared")
    text = (ROOT / "presets/micro.yaml").read_text()
    head, tail = text.split("\nalign:", maxsplit=1)
    (folder / "params.yaml").write_text(f"{head}\nalign:{tail.replace('steps: 4', f'steps: {STEPS}', 1)}")
    config: Config = load_params(folder / "params.yaml")
    assert config.align and config.align.steps == STEPS
    records: list[Record] = [record for index in range(6) for record in scene_records(config, "train", index)]
    write_shards(records, folder / "diffcap", "train", shard_pairs=100)
    (folder / "diffcap/card.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def alone(shared: Path) -> Path:
    """Return a project folder in which one process has run the phase, for comparison."""
    nodes = Nodes(shared / "alone", shared / "params.yaml")
    (shared / "alone/diffcap").symlink_to(shared / "diffcap")
    finished(stage(nodes.folders[0], nodes.scratch))
    return nodes.folders[0]


@pytest.fixture
def nodes(shared: Path, tmp_path: Path) -> Iterator[Nodes]:
    if os.getuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root and iproute2")
    (tmp_path / "diffcap").symlink_to(shared / "diffcap")
    both = Nodes(tmp_path, shared / "params.yaml")
    if subprocess.run(["ip", "netns", "add", "onediff-try"], capture_output=True, check=False).returncode:
        pytest.skip("network namespaces cannot be created on this machine, although the user is root")
    ip("netns", "delete", "onediff-try")
    try:
        both.connect()
        yield both
    finally:
        both.disconnect()


def assert_equal_weights(nodes: Nodes, alone: Path) -> None:
    """Check that the model trained by two nodes has the weights of the model trained by one process.

    The comparison needs a tolerance, because sums over a batch are computed in different orders, and Adam scales up
    the rounding errors in the first steps.
    """
    actual, expected = weights(nodes.folders[0]), weights(alone)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(actual[name], value, rtol=1e-3, atol=1e-4), (name, (actual[name] - value).abs().max())


def test_two_nodes_train_the_weights_that_one_process_trains(nodes: Nodes, alone: Path) -> None:
    nodes.run()
    assert_equal_weights(nodes, alone)
    losses = [[json.loads(line)["loss"] for line in (folder / "data/curves/align.jsonl").read_text().splitlines()]
              for folder in (nodes.folders[0], alone)]
    assert len(losses[0]) == STEPS and losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert not (nodes.folders[1] / "data/models").exists() and not list(nodes.scratch.glob("align-*"))
    assert not (nodes.folders[1] / ".onediff").exists()  # Only rank 0 creates an MLflow run.


@pytest.mark.parametrize("end", ["killed", "unplugged"])
def test_a_lost_node_ends_the_run_and_the_next_run_resumes(end: str, nodes: Nodes, alone: Path) -> None:
    """Lose the second node: the first node notices a killed node at once, and an unplugged node after a timeout."""
    first, second = nodes.start(0), nodes.start(1)
    deadline = time.monotonic() + 240
    while not list(nodes.scratch.glob("align-*/checkpoints/step-*/complete.json")):
        assert time.monotonic() < deadline and first.poll() is None, first.communicate(timeout=60)[0][-3000:]
        time.sleep(0.05)
    if end == "unplugged":
        nodes.plug("down")
    nodes.kill(nodes.names[1])
    killed_at = time.monotonic()
    output, _ = first.communicate(timeout=180)
    second.communicate()
    assert first.returncode == 1 and time.monotonic() - killed_at < (60 if end == "killed" else 150)
    assert "a rank or its node was lost" in output.splitlines()[-1]
    assert "run the same command again to continue from the last checkpoint" in output.splitlines()[-1]
    status = read_status(nodes.run_folder)
    assert status["state"] == "failed" and 0 < status["step"] < STEPS
    assert "a rank or its node was lost" in status["reason"]
    nodes.plug("up")
    resumed_output = nodes.run()[0]
    assert_equal_weights(nodes, alone)
    assert f" 0/{STEPS}" not in resumed_output  # The progress bar starts at the step of the checkpoint.
