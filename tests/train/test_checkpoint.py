from __future__ import annotations

from pathlib import Path

import pytest
import torch
from parts import phase, small

from onediff.config import Runtime
from onediff.train import checkpoint
from onediff.train.engine import Engine
from onediff.train.loop import explain_out_of_memory


def engine(**changes: int) -> Engine:
    return Engine(small(**changes), phase(), Runtime())


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    checkpoint.save(engine_with_moments(), tmp_path, 3, {"best": None})
    return tmp_path


def test_what_was_saved_comes_back_bit_for_bit(saved: Path) -> None:
    first, other = engine(), engine()
    with torch.no_grad():
        for p in other.learning.values():
            p.add_(1)
    assert checkpoint.resume(other, saved)["step"] == 3
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


def test_out_of_memory_says_what_to_change() -> None:
    settings = phase(batch_size=12)
    message = (r"tune: out of memory \(.*\); in runtime.yaml set micro_batch_size below 6, or "
               r"checkpoint_activations: true, or zero_level 2 on several GPUs, or offload: optimizer: 'onediff plan' "
               "tells what fits")
    with (pytest.raises(ValueError, match=message),
          explain_out_of_memory("tune", settings, Runtime(micro_batch_size=6, zero_level=1))):
        torch.empty(1 << 46)
    with pytest.raises(ValueError, match="not of memory"), explain_out_of_memory("tune", settings, Runtime()):
        raise ValueError("not of memory")


def test_an_error_of_shapes_is_not_taken_for_one_of_memory() -> None:
    with (pytest.raises(RuntimeError, match="shapes cannot be multiplied"),
          explain_out_of_memory("tune", phase(), Runtime())):
        torch.zeros(2, 3) @ torch.zeros(2, 3)
