from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from onediff.train.pretrain import backbones, store
from onediff.train.pretrain.backbones import FOLDER, fall_start, rate_factor
from onediff.train.pretrain.examples import ATTRIBUTES

ROOT = Path(__file__).resolve().parents[3]


def test_the_learning_rate_rises_stays_and_falls_towards_zero() -> None:
    factors = [rate_factor(step, 3000) for step in range(3000)]
    assert factors[0] == pytest.approx(1 / 300) and set(factors[300:2000]) == {1.0}
    assert factors[-1] == pytest.approx(1 / 1000) and factors[2000:] == sorted(factors[2000:], reverse=True)


def tower(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "vision/model.safetensors", framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def test_a_longer_run_continues_from_the_state_before_the_learning_rate_fell(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name, value in ((store, "SHARD", 13), (backbones, "NUM_CHECK", 3), (backbones, "BATCH", 3),
                                (backbones, "WARMUP", 1), (backbones, "SAVE_EVERY", 1)):
        monkeypatch.setattr(module, name, value)

    def run(steps: int, name: str, work: str) -> dict[str, torch.Tensor]:
        backbones.main(steps, 1, 13, folder=tmp_path / name, work=tmp_path / work)
        return tower(tmp_path / name)

    fallen = run(3, "short", "work")
    state = torch.load(tmp_path / "work/steady.pt", weights_only=True)
    assert state["step"] == fall_start(3) == 2
    continued = run(5, "continued", "work")
    (tmp_path / "other").mkdir()
    for shard in (tmp_path / "work").glob("*.npz"):
        (tmp_path / "other" / shard.name).hardlink_to(shard)
    straight = run(5, "straight", "other")
    assert all(torch.equal(value, straight[key]) for key, value in continued.items())
    assert any(not torch.equal(value, fallen[key]) for key, value in continued.items())
    figures = json.loads((tmp_path / "straight/figures.json").read_text())
    assert (figures["steps"], figures["images"], figures["chat_steps"]) == (5, 13, 1)


def test_the_committed_backbones_contain_only_a_vision_tower_and_a_language_model() -> None:
    parts = {"vision": ("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm."), "language": ("model.",)}
    for part, allowed in parts.items():
        with safe_open(ROOT / FOLDER / part / "model.safetensors", framework="np") as file:
            assert all(key.startswith(allowed) for key in file.keys())  # noqa: SIM118
    figures = json.loads((ROOT / FOLDER / "figures.json").read_text())
    assert {f"{name}_accuracy" for name in ATTRIBUTES} <= figures.keys()
