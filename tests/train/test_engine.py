"""Tests of the process group that the engine creates without a launcher, and of the optimizer's parameter groups."""

from __future__ import annotations

import os
import subprocess
import sys

from parts import RATES, phase, small

from onediff.config import WeightDecay
from onediff.model.delta import is_inherited
from onediff.train.engine import trainable

ALONE = """
import sys
from onediff.train.engine import start_process_group
import deepspeed, torch  # Imported before the audit hook, because urllib3 binds a socket when it is imported.
events = []
sys.addaudithook(lambda event, arguments: events.append(event) if event == "socket.bind" else None)
start_process_group()
values = torch.ones(3)
torch.distributed.all_reduce(values)
assert values.tolist() == [1, 1, 1] and torch.distributed.get_world_size() == 1
assert not events, f"the process group must not open a port, but socket events occurred: {events}"
"""


def test_a_process_group_of_one_process_opens_no_port() -> None:
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    done = subprocess.run([sys.executable, "-c", ALONE], env=environment | {"DS_ACCELERATOR": "cpu"},
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_inherited_weights_have_a_learning_rate_of_their_own() -> None:
    model = small()
    groups = trainable(model, phase(lr_inherited=1e-5))
    peak_of = {id(p): group["peak"] for group in groups for p in group["params"]}
    rates = {name: peak_of.get(id(p), 0.0) for name, p in model.named_parameters()}
    assert rates == {name: 1e-5 if is_inherited(name) else RATES[f"lr_{model.part_of(name)}"] for name in rates}
    assert any(map(is_inherited, rates)) and rates["delta.layers.0.cross_attention.query.weight"] == RATES["lr_delta"]


def test_inherited_weights_can_be_frozen_while_the_other_weights_of_the_delta_module_are_trained() -> None:
    model = small()
    trainable(model, phase(lr_inherited=0.0))
    delta = {name: p.requires_grad for name, p in model.named_parameters() if model.part_of(name) == "delta"}
    assert delta == {name: not is_inherited(name) for name in delta}


def test_weight_decay_is_set_for_each_part_and_only_for_matrices() -> None:
    model = small()
    decays = {"vision": 0.0, "delta": 0.05, "projector": 0.0, "language": 0.01}
    groups = trainable(model, phase(weight_decay=WeightDecay(**decays)))
    decay_of = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert decay_of[id(p)] == (decays[model.part_of(name)] if p.dim() > 1 else 0), name
    assert [(group["part"], group["peak"]) for group in trainable(small(), phase())] == [
        (part, RATES[f"lr_{part}"]) for part in ("delta", "projector", "language")]
