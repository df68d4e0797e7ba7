"""Estimates of the GPU memory that training needs: model states of DeepSpeed, and activations saved by autograd.

Model states (weights, gradients, optimizer) are computed as DeepSpeed 0.19 stores them for the AdamW of `engine.py`.
Activations are counted with the real model: it runs forward on fake tensors, which have shapes but no data, and the
sizes of all storages that autograd would save are added up.
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
from onediff.model.packing import packed_logits
from onediff.train.cost import Size
from onediff.train.engine import trainable

Offload = Literal["none", "optimizer", "all"]
BUCKET = 500_000_000  # number of gradients that DeepSpeed reduces in one operation (default reduce_bucket_size)
GATHERED = 1_000_000_000  # maximum number of parameters that ZeRO 3 gathers (default stage3_max_live_parameters)
SUB_GROUP = 1_000_000_000  # number of parameters that ZeRO 3 updates at a time (default sub_group_size)


@dataclass(frozen=True)
class Sharing:
    """How DeepSpeed distributes the model states: ZeRO level, offload to CPU memory, and number of ranks."""

    zero_level: int
    offload: Offload
    num_ranks: int


@dataclass(frozen=True)
class States:
    """Bytes of model states on one GPU; `host` are the bytes of CPU memory that are needed for each GPU.

    `buffers` is the memory in which gradients are reduced and weights are gathered. `update` is the memory of float32
    gradients during an optimizer step. `start` is the GPU memory of all weights before DeepSpeed distributes them.
    """

    weights: float
    gradients: float
    optimizer: float
    buffers: float
    update: float
    host: float
    start: float


def states(size: Size, sharing: Sharing, *, bfloat16: bool) -> States:
    """Compute the bytes of model states for a model with `size` parameters, distributed as `sharing` says."""
    level, ranks, each = sharing.zero_level, sharing.num_ranks, 2 if bfloat16 else 4
    learning, everything = size.learning, size.learning + size.frozen
    # DeepSpeed keeps a float32 copy of the weights, except in float32 training without ZeRO.
    master = 4 if bfloat16 or level > 0 else 0
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


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch of pairs, described by its size; all of its rows have the same number of tokens."""

    num_pairs: int
    row_tokens: int
    row_answer_tokens: int


@dataclass(frozen=True)
class Saved:
    """Bytes of activations that autograd saves for one micro-batch.

    `everything` is the amount without activation checkpointing, and `checkpointed` the amount with it. `working` is the
    additional memory that the backward pass needs in both cases.
    """

    everything: int
    checkpointed: int
    working: int


def saved(config: OneDiffConfig, phase: Phase, batch: MicroBatch, *, bfloat16: bool, cached_tower: bool) -> Saved:
    """Count the bytes that autograd saves in a forward pass of one micro-batch.

    The count is for the fused attention of a CPU, which saves its output twice. A GPU needs a few percent less.
    """
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
    """Create the model on the meta device, with adapters and frozen parts as the training engine prepares them."""
    with torch.device("meta"):
        model = OneDiffForConditionalGeneration(config).train()
        trainable(model, phase)
    return model


def _allocate(model: nn.Module) -> None:
    """Replace all meta tensors of the model by fake CPU tensors, so that torch selects the CPU's fused attention."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            module._parameters[name] = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype),
                                                    requires_grad=parameter.requires_grad)
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


class _Counter:
    """Counts the bytes that autograd saves: in total, in each transformer block, and for the input of each block.

    A storage that several tensors share is counted once. Parameters are not counted.
    """

    def __init__(self, model: nn.Module) -> None:
        self.seen = {_storage(p) for p in model.parameters()}
        self.total = 0
        self.alive: list[Tensor] = []  # keeps all saved tensors, so that no later storage can reuse an address
        self.within, self.inputs = Counter[nn.Module](), Counter[nn.Module]()
        for block in model.modules():
            if isinstance(block, GradientCheckpointingLayer):
                block.register_forward_pre_hook(self._enter)
                block.register_forward_hook(self._leave)

    def keep(self, tensor: Tensor) -> Tensor:
        if _storage(tensor) not in self.seen:
            self.seen.add(_storage(tensor))
            self.alive.append(tensor)
            self.total += tensor.untyped_storage().nbytes()
        return tensor

    def _enter(self, block: nn.Module, args: tuple[Any, ...]) -> None:
        self.inputs[block] = args[0].nbytes if args[0].requires_grad else 0
        self.within[block] = -self.total

    def _leave(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.within[block] += self.total


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _loss_of(model: OneDiffForConditionalGeneration, batch: MicroBatch, *, cached_tower: bool) -> Tensor:
    """Compute the loss like the model's `forward`, but without checks of token ids, as fake tensors have no data."""
    config, pairs = model.config, batch.num_pairs
    images = torch.empty(2 * pairs, 3, *[config.vision_config.image_size] * 2)
    states = (torch.empty(2 * pairs, len(config.read_levels), config.num_patches, config.vision_config.hidden_size)
              if cached_tower else model.vision(images))
    views = _views(model, images, states, torch.arange(0, 2 * pairs, 2))
    lengths = [batch.row_tokens] * pairs
    embeds = torch.empty(sum(lengths), config.text_config.hidden_size)  # (T, D)
    if any(view.requires_grad for view in views) or model.language.get_input_embeddings().weight.requires_grad:
        embeds.requires_grad_()
    answers = torch.empty(pairs * batch.row_answer_tokens, dtype=torch.long)  # (A,)
    if model.row_logits is packed_logits:
        logits = packed_logits(model.language, embeds, torch.empty(sum(lengths), dtype=torch.long), lengths, answers)
    else:  # All rows have equal lengths here, so they need no padding.
        logits = model.language(inputs_embeds=embeds.unflatten(0, (pairs, -1)), use_cache=False,
                                logits_to_keep=batch.row_answer_tokens).logits.flatten(0, 1)
    return functional.cross_entropy(logits.float(), torch.empty_like(answers), reduction="sum")


def _views(model: OneDiffForConditionalGeneration, images: Tensor, states: Tensor, first: Tensor) -> list[Tensor]:
    """Return the visual tokens like the model's `project_visual_tokens`, but without reading any tensor's data.

    `images` are the pixels (2P images, 3, height, width), `states` are the vision features of P pairs (2P images, L
    levels, N patches, C channels), and `first` (P,) is the index of the first image of each pair.
    """
    patches = states[:, model.config.read_levels.index(model.config.patch_state)]
    before, after = states[first], states[first + 1]
    fused = model.fusion and model.fusion(torch.stack([images[first], images[first + 1]], 1), before, after)
    delta = None if model.delta is None else model.delta(before, after, fused and fused.keys)
    if model.config.reading == "B":
        return [model.projector(torch.cat([patches, model.enhance_pairs(patches, delta, first)], -1))]
    patches = model.pool(patches)
    if model.config.reading == "C":
        patches = torch.cat([patches[first], patches[first + 1], *([model.pool(fused.patches)] if fused else [])], -1)
    if delta is None:
        return [model.projector(patches)]
    return [model.projector(patches), model.project_delta(delta, fused or None)]
