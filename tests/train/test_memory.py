from __future__ import annotations

from typing import Any

import pytest
import torch
from parts import PLAIN, small
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
                "clip_norm": 1.0, "mask_patches": 0.0, "validate_every": None, "num_val": 1, **PLAIN}
    return Phase(**(settings | TUNE | changes))


def config(**changes: Any) -> OneDiffConfig:
    """Return the configuration of a model in which the small tensors that the plan ignores need little memory."""
    vision = CLIPVisionConfig(hidden_size=64, intermediate_size=176, num_hidden_layers=5, num_attention_heads=4,
                              image_size=PX, patch_size=12)
    text = LlamaConfig(vocab_size=97, hidden_size=128, intermediate_size=304, num_hidden_layers=3,
                       num_attention_heads=4, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    settings = {"reading": "A", "patch_level": -2, "delta_num_tokens": 7, "delta_width": 52, "delta_heads": 4,
                "delta_levels": [1, 3, 5], "image_token_id": IMAGE, "delta_token_id": DELTA} | changes
    return OneDiffConfig(vision_config=vision, text_config=text, **settings)


def batch(configuration: OneDiffConfig) -> dict[str, Tensor]:
    """Return a micro-batch of pairs whose rows have equal length."""
    each = configuration.tokens_per_image * (1 if configuration.reading == "C" else 2)
    row = torch.tensor([IMAGE] * each + [DELTA] * configuration.delta_tokens_read + list(range(3, 3 + TEXT)))
    ids = row.expand(PAIRS, -1)
    labels = ids.clone()
    labels[:, :-ANSWER] = IGNORED
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels,
            "image_counts": torch.full((PAIRS,), 2), "images": torch.randn(2 * PAIRS, 3, PX, PX)}


def bytes_saved_by_autograd(model: OneDiffForConditionalGeneration, inputs: dict[str, Tensor]) -> int:
    """Run a forward pass and return the number of bytes, except parameters, that autograd saves for the backward."""
    saved_tensors: dict[int, Tensor] = {}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            saved_tensors[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(**inputs).loss
    assert loss.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in saved_tensors.values())


FUSION = {"delta_fusion": {"channels": 8, "width": 12, "places": 5, "blocks": 2},
          "delta_classes": {"color": {"red": [3], "blue": [5]},
                            "shape": {"cube": [7], "sphere": [11], "cylinder": [13]}}}


@pytest.mark.parametrize("changes", [{}, {"delta_inputs": "pair_and_matched_difference"}, {"reading": "B"},
                                     {"reading": "C"}, {"delta_num_tokens": 0}, FUSION, FUSION | {"reading": "C"}])
@pytest.mark.parametrize("rates", [ALIGN, TUNE], ids=["align", "tune"])
def test_planned_activations_equal_the_bytes_that_autograd_saves(rates: dict[str, float],
                                                                 changes: dict[str, Any]) -> None:
    configuration = config(**changes)
    model = OneDiffForConditionalGeneration(configuration).train()
    trainable(model, phase(**rates))
    inputs = batch(configuration)
    micro_batch = MicroBatch(PAIRS, inputs["input_ids"].shape[1], ANSWER)
    planned = saved(configuration, phase(**rates), micro_batch, bfloat16=False, cached_tower=False)
    assert planned.everything == pytest.approx(bytes_saved_by_autograd(model, inputs), rel=0.025)


def test_planned_activations_with_lora_equal_the_bytes_that_autograd_saves() -> None:
    configuration, settings = config(), phase(**(ALIGN | {"lr_language": 1e-3}), lora=Lora(rank=5, alpha=10))
    model = OneDiffForConditionalGeneration(configuration).train()
    trainable(model, settings)
    inputs = batch(configuration)
    micro_batch = MicroBatch(PAIRS, inputs["input_ids"].shape[1], ANSWER)
    planned = saved(configuration, settings, micro_batch, bfloat16=False, cached_tower=False)
    assert planned.everything == pytest.approx(bytes_saved_by_autograd(model, inputs), rel=0.02)


def test_planned_activations_with_checkpointing_equal_the_bytes_that_autograd_saves() -> None:
    """Use ZeRO level 3, whose reentrant checkpointing saves inputs through autograd, so the test can count them."""
    configuration = config()
    model = OneDiffForConditionalGeneration(configuration).train()
    trainable(model, phase())
    inputs = batch(configuration)
    micro_batch = MicroBatch(PAIRS, inputs["input_ids"].shape[1], ANSWER)
    planned = saved(configuration, phase(), micro_batch, bfloat16=False, cached_tower=False)
    checkpoint_activations(model, phase(), zero_level=3)
    # The tolerance is large because checkpointing also saves rotary tables and random states of constant size.
    assert planned.checkpointed == pytest.approx(bytes_saved_by_autograd(model, inputs), rel=0.1)
    assert planned.checkpointed < 0.5 * planned.everything


def test_planned_activations_grow_linearly_with_the_number_of_pairs() -> None:
    one, two, five = (saved(config(), phase(), MicroBatch(pairs, 99, 11), bfloat16=True, cached_tower=False).everything
                      for pairs in (1, 2, 5))
    assert five == pytest.approx(one + 4 * (two - one), rel=0.005)


def test_a_frozen_tower_saves_no_activations_with_or_without_cached_features() -> None:
    micro_batch = MicroBatch(3, 99, 11)
    cached, computed = (saved(config(), phase(**ALIGN), micro_batch, bfloat16=False, cached_tower=is_cached).everything
                        for is_cached in (True, False))
    assert cached == computed


def test_a_model_on_the_meta_device_has_the_parameter_counts_of_the_real_model() -> None:
    model = small()
    counts = sizes(hollow(model.config, phase(**ALIGN)))
    assert sum(size.learning + size.frozen for size in counts.values()) == sum(p.numel() for p in model.parameters())
    assert counts["vision"].learning == counts["language"].learning == 0
    assert counts["delta"].frozen == counts["projector"].frozen == 0


@pytest.mark.parametrize(("level", "ranks", "weights", "gradients", "optimizer"), [
    (0, 4, 2 * 110, 2 * 100, 12 * 100), (1, 4, 2 * 110, 2 * 100, 3 * 100), (2, 4, 2 * 110, 2 * 25, 3 * 100),
    (3, 4, 2 * 110 / 4, 2 * 25, 3 * 100)])
def test_each_zero_level_divides_more_of_the_model_states_by_the_number_of_ranks(
        level: int, ranks: int, weights: float, gradients: float, optimizer: float) -> None:
    """Compare the planned bytes of a bfloat16 model with 100 trainable and 10 frozen parameters."""
    planned = states(Size(100, 10), Sharing(level, "none", ranks), bfloat16=True)
    assert (planned.weights, planned.gradients, planned.optimizer) == (weights, gradients, optimizer)
    assert planned.host == 0
    assert planned.buffers == (0, 2 * BUCKET, 2 * BUCKET, 2 * BUCKET + 2 * min(110, GATHERED))[level]


@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_planned_optimizer_states_and_gradients_equal_the_bytes_that_deepspeed_allocates(level: int) -> None:
    configuration, settings = config(), phase(**ALIGN)
    model = OneDiffForConditionalGeneration(configuration).train()
    learning = sum(part.learning for part in sizes(hollow(configuration, settings)).values())
    engine = Engine(model, settings, Runtime(zero_level=level))
    gradients: list[int] = []
    for parameter in engine.learning.values():
        parameter.register_hook(lambda gradient: gradients.append(gradient.nbytes))
    engine.backward(batch(configuration), torch.tensor(float(PAIRS * ANSWER)), torch.tensor(float(PAIRS)))
    engine.step()
    deepspeed = engine._engine.optimizer
    masters = getattr(deepspeed, {3: "fp32_partitioned_groups_flat"}.get(level, "single_partition_of_fp32_groups"), [])
    moments = [state[key] for state in engine.optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    expected = states(Size(learning, 0), Sharing(level, "none", 1), bfloat16=False)
    allocated = sum(tensor.nbytes for tensor in [*masters, *moments])
    engine.close()
    # DeepSpeed pads the flattened tensors of each trainable part, so a small difference is allowed.
    assert allocated == pytest.approx(expected.optimizer, abs=12 * 16)
    assert sum(gradients) == expected.gradients


def test_offload_moves_the_optimizer_states_and_then_the_weights_to_cpu_memory() -> None:
    none, optimizer, everything = (states(Size(100, 10), Sharing(3, offload, 4), bfloat16=True)
                                   for offload in ("none", "optimizer", "all"))
    assert optimizer.optimizer == optimizer.gradients == 0 and optimizer.weights == none.weights
    assert everything.weights == 0 and everything.host - optimizer.host == none.weights
    assert optimizer.host == none.optimizer + none.gradients + none.update
