from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from parts import phase, small

from onediff.config import Runtime
from onediff.train import checkpoint
from onediff.train.engine import Engine
from onediff.train.loop import memory_told

ROOT = Path(__file__).parents[2]
HOLDS = "import sys, time; from pathlib import Path; from onediff.train import checkpoint\n" \
        "with checkpoint.alone(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"


def engine(**changes: int) -> Engine:
    return Engine(small(**changes), phase(), Runtime(), micro_batches=1)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    made = engine()
    made._make_moments()
    checkpoint.save(made, tmp_path, 3, {"best": None})
    return tmp_path


def test_what_was_saved_comes_back_bit_for_bit(saved: Path) -> None:
    first, other = engine(), engine()
    with torch.no_grad():
        for p in other.learning.values():
            p.add_(1)
    kept = checkpoint.resume(other, saved)
    assert kept is not None and kept["step"] == 3
    for name, p in first.learning.items():
        assert torch.equal(p, other.learning[name])
        assert float(other.optimizer.state[other.learning[name]]["step"]) == 3


def test_a_checkpoint_of_another_architecture_is_refused(saved: Path) -> None:
    with pytest.raises(ValueError, match=r"a checkpoint of another architecture: .* \(\d+ differ\); remove the folder"):
        checkpoint.resume(engine(delta_num_tokens=5), saved)


@pytest.mark.parametrize("harm", ["cut", "gone"])
def test_a_checkpoint_whose_files_are_not_whole_is_passed_over(harm: str, saved: Path) -> None:
    checkpoint.save(engine_with_moments(), saved, 5, {})
    [file] = (saved / "checkpoints/step-0000005").glob("*.safetensors")
    if harm == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        file.unlink()
    assert checkpoint.newest(saved) == saved / "checkpoints/step-0000003"


def engine_with_moments() -> Engine:
    made = engine()
    made._make_moments()
    return made


def test_a_checkpoint_holds_nothing_but_tensors(saved: Path) -> None:
    files = [path for path in saved.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json"}


def test_two_runs_cannot_train_in_one_folder(tmp_path: Path) -> None:
    command, environment = [sys.executable, "-c", HOLDS, str(tmp_path)], os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as held:
        assert held.stdout is not None and held.stdout.readline() == b"held\n"
        message = rf"another run trains here \(process {held.pid} on .*\): two would spoil"
        with pytest.raises(ValueError, match=message), checkpoint.alone(tmp_path):
            pass
        held.kill()
    with checkpoint.alone(tmp_path):  # one that was killed holds nothing
        pass


def test_out_of_memory_says_what_to_change() -> None:
    settings = phase(batch_size=12)
    message = (r"tune: out of memory \(.*\); in runtime.yaml set micro_batch_size below 6, or "
               r"checkpoint_activations: true, or zero_level 2 on several GPUs, or offload: optimizer: 'onediff plan' "
               "tells what fits")
    with (pytest.raises(ValueError, match=message),
          memory_told("tune", settings, Runtime(micro_batch_size=6, zero_level=1))):
        torch.empty(1 << 46)
    with pytest.raises(ValueError, match="not of memory"), memory_told("tune", settings, Runtime()):
        raise ValueError("not of memory")


def test_an_error_of_shapes_is_not_taken_for_one_of_memory() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), memory_told("tune", phase(), Runtime()):
        torch.zeros(2, 3) @ torch.zeros(2, 3)


def test_the_folder_is_another_when_anything_that_decides_the_result_is(tmp_path: Path) -> None:
    first = checkpoint.scratch_of(str(tmp_path), "align", [7, {"steps": 3}])
    assert checkpoint.scratch_of(str(tmp_path), "align", [7, {"steps": 3}]) == first
    assert checkpoint.scratch_of(str(tmp_path), "align", [7, {"steps": 4}]) != first
    checkpoint.write_status(first, "running", 2)
    assert json.loads((first / "status.json").read_text()) == {"state": "running", "step": 2, "reason": ""}
    assert time.time() - first.stat().st_mtime < 60
