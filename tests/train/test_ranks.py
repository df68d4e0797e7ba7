"""Several processes do the mathematics of one: every case is run by tests/train/ranks.py."""

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
    """Runs the cases one after the other on `world` processes; gives what they wrote to stdout.

    `dies`: one of them leaves, and so the others fail.
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
    return "".join(said for said, _ in ended)


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
    """Runs on one process."""
    folder = tmp_path_factory.mktemp("one")
    launch(folder, ALONE, 1)
    return folder


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same on two."""
    folder = tmp_path_factory.mktemp("two")
    launch(folder, FEW, 2)
    return folder


@pytest.fixture(scope="module")
def more(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("more")
    launch(folder, MORE + HALF, 2)
    return folder


@pytest.mark.parametrize("case", FEW, ids=lambda case: case["folder"])
def test_two_processes_give_the_losses_and_weights_of_one(case: dict[str, Any], alone: Path, few: Path) -> None:
    """30 steps; answers of 1 to 40 tokens; in every third step one process has no pair at all."""
    assert_alike(few / case["folder"], alone / case["like"])


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE, ids=lambda case: case["folder"])
def test_so_they_do_at_every_level_with_adapters_offload_and_activations_again(case: dict[str, Any], alone: Path,
                                                                               more: Path) -> None:
    assert_alike(more / case["folder"], alone / case["like"])


def assert_alike(two: Path, one: Path) -> None:
    assert len(losses(two)) == 30
    assert losses(two) == pytest.approx(losses(one), abs=5e-6)
    for name, value in weights(one).items():
        if not name.endswith("key.bias"):  # its gradient is only rounding, which Adam blows up
            assert torch.allclose(weights(two)[name], value, atol=2e-5), name


@pytest.mark.slow
@pytest.mark.parametrize("case", HALF, ids=lambda case: case["folder"])
def test_in_bfloat16_too_but_for_its_rounding(case: dict[str, Any], alone: Path, more: Path) -> None:
    assert losses(more / case["folder"]) == pytest.approx(losses(alone / "half"), abs=5e-4)


def test_activations_that_are_computed_again_change_nothing(alone: Path) -> None:
    assert losses(alone / "again") == losses(alone / "plain")


def test_adapters_are_merged_into_the_weights_of_a_plain_model(alone: Path) -> None:
    assert weights(alone / "lora").keys() == weights(alone / "plain").keys()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_killed_on_one_process_goes_on_with_the_same_bits(precision: str, tmp_path: Path, alone: Path) -> None:
    case = {"folder": "cut", "runtime": OFTEN, "precision": precision}
    launch(tmp_path, [case | {"die_at": 13}], 1, dies=True)
    assert len(losses(tmp_path / "cut")) in (12, 13)
    launch(tmp_path, [case], 1)
    whole = weights(alone / ("plain" if precision == "float32" else "half"))
    for name, value in weights(tmp_path / "cut").items():
        assert torch.equal(whole[name], value), name


@pytest.mark.slow
@pytest.mark.parametrize(("level", "precision"), [(3, "float32"), (2, "float32"), (1, "bfloat16")])
def test_killed_on_two_processes_goes_on_with_the_same_bits_and_on_one_too(
        level: int, precision: str, tmp_path: Path, alone: Path) -> None:
    case = {"runtime": OFTEN | {"zero_level": level}, "precision": precision}
    launch(tmp_path, [case | {"folder": "whole"}, case | {"folder": "cut", "die_at": 13}], 2, dies=True)
    shutil.copytree(tmp_path / "cut", tmp_path / "alone")
    newest = sorted((tmp_path / "cut/checkpoints").iterdir())[-1]
    assert [path.suffix for path in newest.iterdir() if path.name != "complete.json"] == [".safetensors"] * 2
    with safe_open(newest / "rank-0000.safetensors", "pt") as file:
        assert not [key for key in file.keys() if key.startswith("vision.")]  # noqa: SIM118  frozen
    launch(tmp_path, [case | {"folder": "cut"}], 2)
    for name, value in weights(tmp_path / "whole").items():
        assert torch.equal(weights(tmp_path / "cut")[name], value), name
    said = launch(tmp_path, [{"folder": "alone", "runtime": {}, "precision": precision}], 1)
    assert f"written by 2 processes at ZeRO level {level}, goes on with 1 at level 0" in said
    like = "plain" if precision == "float32" else "half"
    assert losses(tmp_path / "alone") == pytest.approx(losses(alone / like), abs=5e-6 if like == "plain" else 5e-4)
