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


def engine_with_moments() -> Engine:
    """Return an engine whose optimizer has states, as after the first step."""
    new = engine()
    new._make_moments()
    return new


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Return the folder of a run with a checkpoint of step 3."""
    checkpoint.save(engine_with_moments(), tmp_path, 3, {"best": None})
    return tmp_path


def test_resume_restores_saved_parameters_bit_for_bit(saved: Path) -> None:
    original, resumed = engine(), engine()
    with torch.no_grad():
        for p in resumed.learning.values():
            p.add_(1)
    assert checkpoint.resume(resumed, saved)["step"] == 3
    for name, p in original.learning.items():
        assert torch.equal(p, resumed.learning[name])
        assert float(resumed.optimizer.state[resumed.learning[name]]["step"]) == 3


def test_a_checkpoint_of_another_architecture_is_refused(saved: Path) -> None:
    with pytest.raises(ValueError, match=r"another architecture: .* \(\d+ tensors differ\); delete the folder"):
        checkpoint.resume(engine(delta_num_tokens=5), saved)


@pytest.mark.parametrize("damage", ["truncated", "deleted"])
def test_a_checkpoint_with_incomplete_files_is_skipped(damage: str, saved: Path) -> None:
    checkpoint.save(engine_with_moments(), saved, 5, {})
    [file] = (saved / "checkpoints/step-0000005").glob("*.safetensors")
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        file.unlink()
    assert checkpoint.newest(saved) == saved / "checkpoints/step-0000003"



def test_a_checkpoint_contains_only_safetensors_and_json_files(saved: Path) -> None:
    files = [path for path in saved.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json"}


def test_an_out_of_memory_error_lists_the_settings_that_use_less_memory() -> None:
    settings = phase(batch_size=12)
    message = (r"tune: out of memory \(.*\); in runtime.yaml set micro_batch_size below 6, or "
               r"checkpoint_activations: true, or zero_level 2 on several GPUs, or offload: optimizer; 'onediff plan' "
               "shows which settings fit")
    with (pytest.raises(ValueError, match=message),
          explain_out_of_memory("tune", settings, Runtime(micro_batch_size=6, zero_level=1))):
        torch.empty(1 << 46)
    with pytest.raises(ValueError, match="another error"), explain_out_of_memory("tune", settings, Runtime()):
        raise ValueError("another error")


def test_a_shape_error_is_not_reported_as_out_of_memory() -> None:
    with (pytest.raises(RuntimeError, match="shapes cannot be multiplied"),
          explain_out_of_memory("tune", phase(), Runtime())):
        torch.zeros(2, 3) @ torch.zeros(2, 3)
