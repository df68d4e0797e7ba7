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
from safetensors import safe_open

PROGRAM = Path(__file__).with_name("ranks.py")
OFTEN = {"checkpoint_every_s": 1e-4}
LORA = {"lora": {"rank": 3, "alpha": 6}}


def launch(folder: Path, cases: list[dict[str, Any]], world: int, *, dies: bool = False) -> str:
    """Run the cases one after the other on `world` processes and return the standard output of all processes.

    If `dies` is true, a process is expected to end early, so failures of processes are ignored.
    """
    listed = folder / "cases.json"
    listed.write_text(json.dumps([case | {"folder": str(folder / case["folder"])} for case in cases]))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = os.environ | {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                           "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
                           "PYTHONPATH": f"{PROGRAM.parents[1]}:{PROGRAM.parents[2]}"}
    started = [subprocess.Popen([sys.executable, "-W", "ignore", str(PROGRAM), str(listed)], stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, text=True, env=shared | {"RANK": rank, "LOCAL_RANK": rank})
               for rank in map(str, range(world))]
    try:
        ended = [process.communicate(timeout=400) for process in started]
    finally:
        for process in started:
            process.kill()
    assert dies or not any(process.returncode for process in started), ended[0][1][-3000:]
    return "".join(stdout for stdout, _ in ended)


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "curve.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "weights.pt", weights_only=True)


ALONE = [{"folder": "plain", "runtime": {}}, {"folder": "lora", "runtime": {}, "phase": LORA},
         {"folder": "again", "runtime": {"checkpoint_activations": True}},
         {"folder": "half", "runtime": {}, "precision": "bfloat16"}]
FEW = [{"folder": f"zero{level}x{num}", "runtime": {"zero_level": level}, "num_micro": num, "like": "plain"}
       for level, num in ((2, 1), (3, 2))]
MORE = [{"folder": f"zero{level}x{num}", "runtime": {"zero_level": level}, "num_micro": num, "like": "plain"}
        for level, num in ((0, 2), (1, 1), (1, 2), (2, 2), (3, 1))]
MORE += [{"folder": "lora3", "runtime": {"zero_level": 3}, "phase": LORA, "like": "lora"},
         {"folder": "again3", "runtime": {"zero_level": 3, "checkpoint_activations": True}, "like": "plain"},
         {"folder": "offloaded2", "runtime": {"zero_level": 2, "offload": "optimizer"}, "like": "plain"},
         {"folder": "offloaded3", "runtime": {"zero_level": 3, "offload": "all"}, "like": "plain"}]
HALF = [{"folder": f"half{level}", "runtime": {"zero_level": level}, "precision": "bfloat16", "like": "half"}
        for level in (0, 1, 3)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the results of the cases in ALONE, run on one process."""
    folder = tmp_path_factory.mktemp("one")
    launch(folder, ALONE, 1)
    return folder


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the results of the cases in FEW, run on two processes."""
    folder = tmp_path_factory.mktemp("two")
    launch(folder, FEW, 2)
    return folder


@pytest.fixture(scope="module")
def more(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the results of the cases in MORE and HALF, run on two processes."""
    folder = tmp_path_factory.mktemp("more")
    launch(folder, MORE + HALF, 2)
    return folder


@pytest.mark.parametrize("case", FEW, ids=lambda case: case["folder"])
def test_two_processes_give_the_losses_and_weights_of_one(case: dict[str, Any], alone: Path, few: Path) -> None:
    """Train 30 steps with answers of 1 to 40 tokens. In every third step, one process has no pair."""
    assert_alike(few / case["folder"], alone / case["like"])


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE, ids=lambda case: case["folder"])
def test_two_processes_give_the_losses_and_weights_of_one_in_further_settings(case: dict[str, Any], alone: Path,
                                                                              more: Path) -> None:
    """The settings are all ZeRO levels, LoRA adapters, offload, and activation checkpointing."""
    assert_alike(more / case["folder"], alone / case["like"])


def assert_alike(two: Path, one: Path) -> None:
    """Check that the run on two processes has the losses and weights of the run on one process."""
    assert len(losses(two)) == 30
    assert losses(two) == pytest.approx(losses(one), abs=5e-6)
    for name, value in weights(one).items():
        # The exact gradient of a key bias is 0. The computed one is a rounding error, which Adam scales up.
        if not name.endswith("key.bias"):
            assert torch.allclose(weights(two)[name], value, atol=2e-5), name


@pytest.mark.slow
@pytest.mark.parametrize("case", HALF, ids=lambda case: case["folder"])
def test_in_bfloat16_two_processes_give_the_losses_of_one(case: dict[str, Any], alone: Path, more: Path) -> None:
    assert losses(more / case["folder"]) == pytest.approx(losses(alone / "half"), abs=5e-4)


def test_activation_checkpointing_does_not_change_the_losses(alone: Path) -> None:
    assert losses(alone / "again") == losses(alone / "plain")


def test_the_result_of_lora_training_has_no_adapter_weights(alone: Path) -> None:
    assert weights(alone / "lora").keys() == weights(alone / "plain").keys()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_killed_run_on_one_process_resumes_with_equal_bits(precision: str, tmp_path: Path, alone: Path) -> None:
    case = {"folder": "cut", "runtime": OFTEN, "precision": precision}
    launch(tmp_path, [case | {"die_at": 13}], 1, dies=True)
    assert len(losses(tmp_path / "cut")) in (12, 13)
    launch(tmp_path, [case], 1)
    uninterrupted = weights(alone / ("plain" if precision == "float32" else "half"))
    for name, value in weights(tmp_path / "cut").items():
        assert torch.equal(uninterrupted[name], value), name


@pytest.mark.slow
@pytest.mark.parametrize(("level", "precision"), [(3, "float32"), (2, "float32"), (1, "bfloat16")])
def test_a_killed_run_on_two_processes_resumes_with_equal_bits_and_can_resume_on_one_process(
        level: int, precision: str, tmp_path: Path, alone: Path) -> None:
    case = {"runtime": OFTEN | {"zero_level": level}, "precision": precision}
    launch(tmp_path, [case | {"folder": "uninterrupted"}, case | {"folder": "cut", "die_at": 13}], 2, dies=True)
    shutil.copytree(tmp_path / "cut", tmp_path / "alone")
    newest = sorted((tmp_path / "cut/checkpoints").iterdir())[-1]
    assert [path.suffix for path in newest.iterdir() if path.name != "complete.json"] == [".safetensors"] * 2
    with safe_open(newest / "rank-0000.safetensors", "pt") as file:
        assert not [key for key in file.keys() if key.startswith("vision.")]  # noqa: SIM118
    launch(tmp_path, [case | {"folder": "cut"}], 2)
    for name, value in weights(tmp_path / "uninterrupted").items():
        assert torch.equal(weights(tmp_path / "cut")[name], value), name
    stdout = launch(tmp_path, [{"folder": "alone", "runtime": {}, "precision": precision}], 1)
    assert f"written by 2 processes at ZeRO level {level}, resumed by 1 processes at level 0" in stdout
    like = "plain" if precision == "float32" else "half"
    assert losses(tmp_path / "alone") == pytest.approx(losses(alone / like), abs=5e-6 if like == "plain" else 5e-4)
