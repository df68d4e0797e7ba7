from __future__ import annotations

from typing import Any

import pytest
import torch
from parts import small
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig

from onediff.config import Lora, Phase, Runtime
from onediff.inputs.processing import IGNORED
from onediff.model.configuration import OneDiffConfig
from onediff.model.onediff import OneDiffForConditionalGeneration
from onediff.train.cost import Size, sizes
from onediff.train.engine import Engine, checkpoint_activations, trainable
from onediff.train.memory import BUCKET, GATHERED, MicroBatch, Sharing, hollow, saved, states

ALIGN = {"lr_vision": 0.0, "lr_delta": 1e-3, "lr_projector": 1e-3, "lr_language": 0.0}
TUNE = dict.fromkeys(ALIGN, 1e-3)
IMAGE, DELTA, PX = 101, 102, 60
PAIRS, TEXT, ANSWER = 3, 41, 17


def phase(**changes: Any) -> Phase:
    settings = {"mixture": {"scenes": 1.0}, "steps": 5, "epochs": None, "batch_size": 6, "lora": None, "warmup": 0.0,
                "weight_decay": 0.0, "clip_norm": 1.0, "mask_patches": 0.0, "validate_every": None, "num_val": 1}
    return Phase(**(settings | TUNE | changes))


def config(**changes: Any) -> OneDiffConfig:
    """Wide enough for the small things that the plan leaves out to be small."""
    vision = CLIPVisionConfig(hidden_size=64, intermediate_size=176, num_hidden_layers=5, num_attention_heads=4,
                              image_size=PX, patch_size=12)
    text = LlamaConfig(vocab_size=97, hidden_size=128, intermediate_size=304, num_hidden_layers=3,
                       num_attention_heads=4, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    settings = {"reading": "A", "patch_level": -2, "delta_num_tokens": 7, "delta_width": 52, "delta_heads": 4,
                "delta_levels": [1, 3, 5], "image_token_id": IMAGE, "delta_token_id": DELTA} | changes
    return OneDiffConfig(vision_config=vision, text_config=text, **settings)


def batch(configuration: OneDiffConfig) -> dict[str, Tensor]:
    each = configuration.tokens_per_image * (1 if configuration.reading == "C" else 2)
    row = torch.tensor([IMAGE] * each + [DELTA] * configuration.delta_tokens_read + list(range(3, 3 + TEXT)))
    ids = row.expand(PAIRS, -1)
    labels = ids.clone()
    labels[:, :-ANSWER] = IGNORED
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels,
            "image_counts": torch.full((PAIRS,), 2), "images": torch.randn(2 * PAIRS, 3, PX, PX)}


def really_saved(model: OneDiffForConditionalGeneration, inputs: dict[str, Tensor]) -> int:
    """The plain count: every storage that autograd keeps in a real forward pass, parameters left out."""
    kept: dict[int, Tensor] = {}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(**inputs).loss
    assert loss.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("changes", [{}, {"delta_inputs": "pair_and_matched_difference"}, {"reading": "B"},
                                     {"reading": "C"}, {"delta_num_tokens": 0}])
@pytest.mark.parametrize("rates", [ALIGN, TUNE], ids=["align", "tune"])
def test_the_plan_counts_what_autograd_really_saves(rates: dict[str, float], changes: dict[str, Any]) -> None:
    configuration = config(**changes)
    model = OneDiffForConditionalGeneration(configuration).train()
    trainable(model, phase(**rates))
    inputs = batch(configuration)
    micro_batch = MicroBatch(PAIRS, inputs["input_ids"].shape[1], ANSWER)
    planned = saved(configuration, phase(**rates), micro_batch, bfloat16=False, cached_tower=False)
    assert planned.everything == pytest.approx(really_saved(model, inputs), rel=0.02)


def test_the_plan_counts_what_adapters_make_autograd_save() -> None:
    configuration, settings = config(), phase(**(ALIGN | {"lr_language": 1e-3}), lora=Lora(rank=5, alpha=10))
    model = OneDiffForConditionalGeneration(configuration).train()
    trainable(model, settings)
    inputs = batch(configuration)
    micro_batch = MicroBatch(PAIRS, inputs["input_ids"].shape[1], ANSWER)
    planned = saved(configuration, settings, micro_batch, bfloat16=False, cached_tower=False)
    assert planned.everything == pytest.approx(really_saved(model, inputs), rel=0.02)


def test_the_plan_knows_what_blocks_keep_that_run_again() -> None:
    """The reentrant kind hands its inputs to autograd, so that they can be counted."""
    configuration = config()
    model = OneDiffForConditionalGeneration(configuration).train()
    trainable(model, phase())
    inputs = batch(configuration)
    micro_batch = MicroBatch(PAIRS, inputs["input_ids"].shape[1], ANSWER)
    planned = saved(configuration, phase(), micro_batch, bfloat16=False, cached_tower=False)
    checkpoint_activations(model, phase(), zero_level=3)
    # Beyond the inputs it keeps rotary tables and states of the random generator, which only so small a model notices.
    assert planned.checkpointed == pytest.approx(really_saved(model, inputs), rel=0.1)
    assert planned.checkpointed < 0.5 * planned.everything


def test_saved_bytes_grow_by_as_much_with_every_pair() -> None:
    one, two, five = (saved(config(), phase(), MicroBatch(pairs, 99, 11), bfloat16=True, cached_tower=False).everything
                      for pairs in (1, 2, 5))
    assert five == pytest.approx(one + 4 * (two - one), rel=0.005)


def test_features_computed_beforehand_leave_the_tower_out() -> None:
    micro_batch = MicroBatch(3, 99, 11)
    kept = [saved(config(), phase(**ALIGN), micro_batch, bfloat16=False, cached_tower=cached).everything
            for cached in (True, False)]
    assert kept[0] == kept[1]  # a frozen tower keeps nothing anyway


def test_parameters_counted_without_contents_are_the_model_s() -> None:
    model = small()
    counts = sizes(hollow(model.config, phase(**ALIGN)))
    assert sum(size.learning + size.frozen for size in counts.values()) == sum(p.numel() for p in model.parameters())
    assert counts["vision"].learning == counts["language"].learning == 0
    assert counts["delta"].frozen == counts["projector"].frozen == 0


# --- states ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("level", "ranks", "weights", "gradients", "optimizer"), [
    (0, 4, 2 * 110, 2 * 100, 12 * 100), (1, 4, 2 * 110, 2 * 100, 3 * 100), (2, 4, 2 * 110, 2 * 25, 3 * 100),
    (3, 4, 2 * 110 / 4, 2 * 25, 3 * 100)])
def test_states_in_bfloat16(level: int, ranks: int, weights: float, gradients: float, optimizer: float) -> None:
    held = states(Size(100, 10), Sharing(level, "none", ranks), bfloat16=True)
    assert (held.weights, held.gradients, held.optimizer) == (weights, gradients, optimizer)
    assert held.host == 0
    assert held.buffers == (0, 2 * BUCKET, 2 * BUCKET, 2 * BUCKET + 2 * min(110, GATHERED))[level]


@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_the_plan_counts_the_optimizer_and_the_gradients_that_deepspeed_really_holds(level: int) -> None:
    """Alignment adds a few numbers for each part that learns."""
    configuration, settings = config(), phase(**ALIGN)
    model = OneDiffForConditionalGeneration(configuration).train()
    learning = sum(part.learning for part in sizes(hollow(configuration, settings)).values())
    engine = Engine(model, settings, Runtime(zero_level=level))
    gradients: list[int] = []
    for parameter in engine.learning.values():
        parameter.register_hook(lambda gradient: gradients.append(gradient.nbytes))
    engine.backward(batch(configuration), torch.tensor(float(PAIRS * ANSWER)))
    engine.step()
    deepspeed = engine._engine.optimizer
    masters = getattr(deepspeed, {3: "fp32_partitioned_groups_flat"}.get(level, "single_partition_of_fp32_groups"), [])
    moments = [state[key] for state in engine.optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    expected = states(Size(learning, 0), Sharing(level, "none", 1), bfloat16=False)
    held = sum(tensor.nbytes for tensor in [*masters, *moments])
    engine.close()
    assert held == pytest.approx(expected.optimizer, abs=12 * 16)
    assert sum(gradients) == expected.gradients


def test_offload_moves_the_optimizer_and_then_the_weights_to_the_host() -> None:
    here, there, away = (states(Size(100, 10), Sharing(3, offload, 4), bfloat16=True)
                         for offload in ("none", "optimizer", "all"))
    assert there.optimizer == there.gradients == 0 and there.weights == here.weights
    assert away.weights == 0 and away.host - there.host == here.weights
    assert there.host == here.optimizer + here.gradients + here.update
