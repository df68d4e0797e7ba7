"""Memory of one GPU in training: what DeepSpeed keeps for each parameter, and what autograd keeps of a micro-batch.

The states are counted as DeepSpeed 0.19 holds them, with the optimizer that `engine.py` gives it. The activations are
not modelled but counted: the real model runs forward on tensors without contents, and every storage that autograd
would save is added up.
Shapes:  P pairs, N patches per image, L levels, T tokens of all rows together, A answer tokens, D language-model width.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import local_torch_dtype

from onediff.config import Phase
from onediff.model.configuration import OneDiffConfig
from onediff.model.onediff import OneDiffForConditionalGeneration
from onediff.model.packing import no_mask
from onediff.train.cost import Size
from onediff.train.engine import trainable

Offload = Literal["none", "optimizer", "all"]
BUCKET = 500_000_000  # gradients reduced at once: DeepSpeed's reduce_bucket_size
GATHERED = 1_000_000_000  # weights that ZeRO 3 holds whole at once: stage3_max_live_parameters
SUB_GROUP = 1_000_000_000  # weights that ZeRO 3 updates at once: sub_group_size


# --- what is kept for each parameter ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sharing:
    """How a model's states are shared between the ranks."""

    zero_level: int
    offload: Offload
    num_ranks: int


@dataclass(frozen=True)
class States:
    """Bytes on one GPU; `buffers`: reduction and gathering; `update`: float32 gradients while the optimizer steps;
    `host`: in the CPU's memory, per GPU.
    """

    weights: float
    gradients: float
    optimizer: float
    buffers: float
    update: float
    host: float
    start: float  # all weights, before they are shared


def states(size: Size, sharing: Sharing, *, bfloat16: bool) -> States:
    level, ranks, each = sharing.zero_level, sharing.num_ranks, 2 if bfloat16 else 4
    learning, everything = size.learning, size.learning + size.frozen
    master = 4 if bfloat16 or level > 0 else 0  # in float32 only plain training updates the weights themselves
    weights = each * everything / (ranks if level == 3 else 1)
    gradients = each * learning / (ranks if level >= 2 else 1)
    optimizer = (master + 8) * learning / (ranks if level >= 1 else 1)
    buffers = float(each * BUCKET) if level else 0.0
    update = 4 * learning / (ranks if level else 1) if bfloat16 or level else 0.0
    if level == 3:
        buffers += each * min(GATHERED, everything)
        update = min(update, 4.0 * SUB_GROUP)
    host = 0.0
    if sharing.offload != "none":
        host, optimizer, update = optimizer + update, 0.0, 0.0
        if level >= 2:
            host, gradients = host + gradients, 0.0
    if sharing.offload == "all":
        host, weights = host + weights, 0.0
    return States(weights, gradients, optimizer, buffers, update, host, float(each * everything))


# --- what autograd keeps of a micro-batch -----------------------------------------------------------------------------


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch of pairs, with rows of equal length."""

    num_pairs: int
    row_tokens: int
    row_answer_tokens: int


@dataclass(frozen=True)
class Saved:
    """Bytes: all that autograd keeps; with blocks that keep only their inputs (`runtime.checkpoint_activations`); and
    what comes on top of either while the backward pass runs.
    """

    everything: int
    checkpointed: int
    working: int


def saved(config: OneDiffConfig, phase: Phase, batch: MicroBatch, *, bfloat16: bool, cached_tower: bool) -> Saved:
    """On a CPU's fused attention, whose output is kept a second time: on a GPU a few percent less."""
    with local_torch_dtype(torch.bfloat16 if bfloat16 else torch.float32):
        model = hollow(config, phase)
        with FakeTensorMode():
            _allocate(model)
            counter = _Counter(model)
            with saved_tensors_hooks(counter.keep, lambda tensor: tensor):
                _loss_of(model, batch, cached_tower=cached_tower)
    logits = batch.num_pairs * batch.row_answer_tokens * config.text_config.vocab_size
    checkpointed = counter.total - counter.within.total() + counter.inputs.total()
    return Saved(counter.total, checkpointed, max([*counter.within.values(), 10 * logits]))


def hollow(config: OneDiffConfig, phase: Phase) -> OneDiffForConditionalGeneration:
    """The model as the engine prepares it, with adapters and frozen parts, on the device without contents."""
    with torch.device("meta"):
        model = OneDiffForConditionalGeneration(config).train()
        trainable(model, phase)
    return model


def _allocate(model: nn.Module) -> None:
    """In place, from the device without contents to a CPU's tensors without contents, which take its fused attention.
    """
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            module._parameters[name] = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype),
                                                    requires_grad=parameter.requires_grad)
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


class _Counter:
    """Adds up each storage once, parameters left out; for each block what was saved in it, and the size of its input.
    """

    def __init__(self, model: nn.Module) -> None:
        self.seen = {_storage(p) for p in model.parameters()}
        self.total = 0
        self.within, self.inputs = Counter[nn.Module](), Counter[nn.Module]()
        for block in model.modules():
            if isinstance(block, GradientCheckpointingLayer):
                block.register_forward_pre_hook(self._enter)
                block.register_forward_hook(self._leave)

    def keep(self, tensor: Tensor) -> Tensor:
        if _storage(tensor) not in self.seen:
            self.seen.add(_storage(tensor))
            self.total += tensor.untyped_storage().nbytes()
        return tensor  # and so alive: no later storage can have its address

    def _enter(self, block: nn.Module, args: tuple[Any, ...]) -> None:
        self.inputs[block] = args[0].nbytes if args[0].requires_grad else 0
        self.within[block] = -self.total

    def _leave(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.within[block] += self.total


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _loss_of(model: OneDiffForConditionalGeneration, batch: MicroBatch, *, cached_tower: bool) -> Tensor:
    """`forward` on pairs, without the checks of ids and counts, because these tensors have no contents."""
    config, pairs = model.config, batch.num_pairs
    if cached_tower:
        states = torch.empty(2 * pairs, len(config.read_levels), config.num_patches, config.vision_config.hidden_size)
    else:
        side = config.vision_config.image_size
        states = model.vision(torch.empty(2 * pairs, 3, side, side))
    views = _views(model, states, torch.arange(0, 2 * pairs, 2))
    lengths = [batch.row_tokens] * pairs
    embeds = torch.empty(1, sum(lengths), config.text_config.hidden_size)  # (1, T, D)
    if any(view.requires_grad for view in views) or model.language.get_input_embeddings().weight.requires_grad:
        embeds.requires_grad_()
    answers = torch.empty(pairs * batch.row_answer_tokens, dtype=torch.long)  # (A,)
    places = torch.empty(1, sum(lengths), dtype=torch.long)
    logits = model.language(inputs_embeds=embeds, position_ids=places, attention_mask=no_mask(embeds), lengths=lengths,
                            logits_to_keep=answers, use_cache=False).logits[0]
    return functional.cross_entropy(logits.float(), torch.empty_like(answers), reduction="sum")


def _views(model: OneDiffForConditionalGeneration, states: Tensor, first: Tensor) -> list[Tensor]:
    """As the model's `look`: states (2P, L, N, C), the number of each pair's first image (P,) -> what is spliced."""
    patches = states[:, model.config.read_levels.index(model.config.patch_state)]
    delta = None if model.delta is None else model.delta(states[first], states[first + 1])
    if model.config.reading == "B":
        return [model.projector(torch.cat([patches, model.enhanced(patches, delta, first)], -1))]
    patches = model.pool(patches)
    if model.config.reading == "C":
        patches = torch.cat([patches[first], patches[first + 1]], -1)
    return [model.projector(patches), *([] if delta is None else [model.delta_projector(delta)])]
