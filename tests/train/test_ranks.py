"""Tests that training on two processes gives the results of one process; tests/train/ranks.py runs each case."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from parts import FUSION
from safetensors import safe_open

PROGRAM = Path(__file__).with_name("ranks.py")
CHECKPOINT_OFTEN = {"checkpoint_every_s": 1e-4}
LORA = {"lora": {"rank": 3, "alpha": 6}}


def launch(folder: Path, cases: list[dict[str, Any]], world: int, *, dies: bool = False) -> str:
    """Run the cases one after the other on `world` processes and return the standard output of all processes.

    If `dies` is true, a process is expected to end early, so failures of processes are ignored.
    """
    case_file = folder / "cases.json"
    case_file.write_text(json.dumps([case | {"folder": str(folder / case["folder"])} for case in cases]))
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = str(unused.getsockname()[1])
    shared = os.environ | {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                           "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
                           "PYTHONPATH": f"{PROGRAM.parents[1]}:{PROGRAM.parents[2]}"}
    processes = [subprocess.Popen([sys.executable, "-W", "ignore", str(PROGRAM), str(case_file)],
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                  env=shared | {"RANK": rank, "LOCAL_RANK": rank})
                 for rank in map(str, range(world))]
    try:
        outputs = [process.communicate(timeout=400) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert dies or not any(process.returncode for process in processes), outputs[0][1][-3000:]
    return "".join(stdout for stdout, _ in outputs)


def losses(folder: Path) -> list[float]:
    """Return the loss of each step or, if the run has auxiliary losses, the sum of all losses of each step."""
    lines = map(json.loads, (folder / "curve.jsonl").read_text().splitlines())
    return [sum(line.get(name, 0) for name in ("loss", "place", "changed", "object")) for line in lines]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "weights.pt", weights_only=True)


# A case is a training run: the folder for its results and the settings that it changes. Cases on two processes are
# compared with the case `expected` on one process.
ONE_PROCESS = [{"folder": "float32", "runtime": {}}, {"folder": "lora", "runtime": {}, "phase": LORA},
               {"folder": "checkpointed", "runtime": {"checkpoint_activations": True}},
               {"folder": "bfloat16", "runtime": {}, "precision": "bfloat16"}]
FUSED = {"model": FUSION, "phase": {"auxiliary": {"place": 2.0, "changed": 0.1, "object": 0.6}}}
ONE_PROCESS += [FUSED | {"folder": "fused", "runtime": {}}]
SAMPLES = {"phase": {"loss": "samples", "weight_decay": {"vision": 0.0, "delta": 0.05, "projector": 0.0,
                                                         "language": 0.01}}}
ONE_PROCESS += [SAMPLES | {"folder": "samples", "runtime": {}}]
TWO_PROCESSES = [
    {"folder": f"zero{level}x{num}", "runtime": {"zero_level": level}, "num_micro": num, "expected": "float32"}
    for level, num in ((2, 1), (3, 2))] + [
    FUSED | {"folder": f"fused{level}", "runtime": {"zero_level": level}, "num_micro": 2, "expected": "fused"}
    for level in (2, 3)] + [
    SAMPLES | {"folder": "samples2", "runtime": {"zero_level": 2}, "num_micro": 2, "expected": "samples"}]
TWO_PROCESSES_SLOW = [
    {"folder": f"zero{level}x{num}", "runtime": {"zero_level": level}, "num_micro": num, "expected": "float32"}
    for level, num in ((0, 2), (1, 1), (1, 2), (2, 2), (3, 1))]
TWO_PROCESSES_SLOW += [
    SAMPLES | {"folder": "samples3", "runtime": {"zero_level": 3}, "expected": "samples"},
    {"folder": "lora3", "runtime": {"zero_level": 3}, "phase": LORA, "expected": "lora"},
    {"folder": "checkpointed3", "runtime": {"zero_level": 3, "checkpoint_activations": True}, "expected": "float32"},
    {"folder": "offloaded2", "runtime": {"zero_level": 2, "offload": "optimizer"}, "expected": "float32"},
    {"folder": "offloaded3", "runtime": {"zero_level": 3, "offload": "all"}, "expected": "float32"}]
TWO_PROCESSES_BFLOAT16 = [
    {"folder": f"bfloat16_{level}", "runtime": {"zero_level": level}, "precision": "bfloat16"} for level in (0, 1, 3)]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the results of the cases in ONE_PROCESS."""
    folder = tmp_path_factory.mktemp("one")
    launch(folder, ONE_PROCESS, 1)
    return folder


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the results of the cases in TWO_PROCESSES."""
    folder = tmp_path_factory.mktemp("two")
    launch(folder, TWO_PROCESSES, 2)
    return folder


@pytest.fixture(scope="module")
def two_processes_slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the results of the cases in TWO_PROCESSES_SLOW and TWO_PROCESSES_BFLOAT16."""
    folder = tmp_path_factory.mktemp("slow")
    launch(folder, TWO_PROCESSES_SLOW + TWO_PROCESSES_BFLOAT16, 2)
    return folder


@pytest.mark.parametrize("case", TWO_PROCESSES, ids=lambda case: case["folder"])
def test_two_processes_give_the_losses_and_weights_of_one(case: dict[str, Any], one_process: Path,
                                                          two_processes: Path) -> None:
    """Train 30 steps with answers of 1 to 40 tokens. In every third step, one process has no pair."""
    assert_equal_runs(two_processes / case["folder"], one_process / case["expected"])


@pytest.mark.slow
@pytest.mark.parametrize("case", TWO_PROCESSES_SLOW, ids=lambda case: case["folder"])
def test_two_processes_give_the_losses_and_weights_of_one_with_all_training_options(
        case: dict[str, Any], one_process: Path, two_processes_slow: Path) -> None:
    """Train with each ZeRO level, with LoRA adapters, with offload, and with activation checkpointing."""
    assert_equal_runs(two_processes_slow / case["folder"], one_process / case["expected"])


def assert_equal_runs(two: Path, one: Path) -> None:
    """Check that the run on two processes has the losses and weights of the run on one process."""
    assert len(losses(two)) == 30
    assert losses(two) == pytest.approx(losses(one), abs=5e-6)
    for name, value in weights(one).items():
        # The exact gradient of a key bias is 0. The computed gradient is a rounding error, which Adam scales up.
        if not name.endswith("key.bias"):
            assert torch.allclose(weights(two)[name], value, atol=2e-5), name


@pytest.mark.slow
@pytest.mark.parametrize("case", TWO_PROCESSES_BFLOAT16, ids=lambda case: case["folder"])
def test_in_bfloat16_two_processes_give_the_losses_of_one(case: dict[str, Any], one_process: Path,
                                                          two_processes_slow: Path) -> None:
    assert losses(two_processes_slow / case["folder"]) == pytest.approx(losses(one_process / "bfloat16"), abs=5e-4)


def test_activation_checkpointing_does_not_change_the_losses(one_process: Path) -> None:
    assert losses(one_process / "checkpointed") == losses(one_process / "float32")


def test_the_result_of_lora_training_has_no_adapter_weights(one_process: Path) -> None:
    assert weights(one_process / "lora").keys() == weights(one_process / "float32").keys()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_killed_run_on_one_process_resumes_with_equal_bits(precision: str, tmp_path: Path,
                                                             one_process: Path) -> None:
    case = {"folder": "killed", "runtime": CHECKPOINT_OFTEN, "precision": precision}
    launch(tmp_path, [case | {"die_at": 13}], 1, dies=True)
    assert len(losses(tmp_path / "killed")) in (12, 13)
    launch(tmp_path, [case], 1)
    uninterrupted = weights(one_process / precision)
    for name, value in weights(tmp_path / "killed").items():
        assert torch.equal(uninterrupted[name], value), name


@pytest.mark.slow
@pytest.mark.parametrize(("level", "precision"), [(3, "float32"), (2, "float32"), (1, "bfloat16")])
def test_a_killed_run_on_two_processes_resumes_with_equal_bits_and_can_resume_on_one_process(
        level: int, precision: str, tmp_path: Path, one_process: Path) -> None:
    case = {"runtime": CHECKPOINT_OFTEN | {"zero_level": level}, "precision": precision}
    launch(tmp_path, [case | {"folder": "uninterrupted"}, case | {"folder": "killed", "die_at": 13}], 2, dies=True)
    shutil.copytree(tmp_path / "killed", tmp_path / "resumed_by_one")
    newest = sorted((tmp_path / "killed/checkpoints").iterdir())[-1]
    assert [path.suffix for path in newest.iterdir() if path.name != "complete.json"] == [".safetensors"] * 2
    with safe_open(newest / "rank-0000.safetensors", "pt") as file:
        assert not [key for key in file.keys() if key.startswith("vision.")]  # noqa: SIM118
    launch(tmp_path, [case | {"folder": "killed"}], 2)
    for name, value in weights(tmp_path / "uninterrupted").items():
        assert torch.equal(weights(tmp_path / "killed")[name], value), name
    stdout = launch(tmp_path, [{"folder": "resumed_by_one", "runtime": {}, "precision": precision}], 1)
    assert f"written by 2 processes at ZeRO level {level}, resumed by 1 processes at level 0" in stdout
    assert losses(tmp_path / "resumed_by_one") == pytest.approx(losses(one_process / precision),
                                                                abs=5e-6 if precision == "float32" else 5e-4)
