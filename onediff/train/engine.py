"""DeepSpeed, which distributes memory and work over the GPUs. No other file imports it."""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from onediff.config import Phase, Runtime, Tune
from onediff.inputs.processing import IGNORED
from onediff.model.delta import is_inherited
from onediff.model.onediff import PARTS, OneDiffForConditionalGeneration
from onediff.train import lora

BETAS = (0.9, 0.999)
MOMENTS = ("exp_avg", "exp_avg_sq")
# Name of the private DeepSpeed method that, under ZeRO 1 and 2, gives each parameter access to its Adam moments.
LINK = "_lazy_init_hp_params_optimizer_state"


def start_process_group() -> None:
    """Join the process group of the ranks that a launcher started; without a launcher, create a group of one rank."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import deepspeed

    if torch.distributed.is_initialized():
        return
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
        # An in-memory store needs no port. Another process could take a free port before this process opens it.
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    if not torch.cuda.is_available():
        # On a CPU, DeepSpeed would otherwise compile a C++ extension, and fail on a machine without a compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(backend, verbose=False)


def limit_waits() -> None:
    """Set the timeout of every process group to the environment variable DEEPSPEED_TIMEOUT, in minutes.

    DeepSpeed itself sets only the timeout of the first group. Other gloo groups would wait 30 minutes for a lost node.
    """
    from deepspeed.constants import default_pg_timeout
    from torch.distributed import distributed_c10d

    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(default_pg_timeout, group)


def learning_rates(phase: Phase) -> dict[str, float]:
    """Return the peak learning rate of each part of the model, in the order of the optimizer's parameter groups."""
    return {part: getattr(phase, f"lr_{part}") for part in PARTS}


def auxiliary_weights(phase: Phase) -> dict[str, float]:
    """Return the weight of each auxiliary loss of a phase; the dictionary is empty if the phase has none."""
    return phase.auxiliary.model_dump() if isinstance(phase, Tune) and phase.auxiliary else {}


def trainable(model: OneDiffForConditionalGeneration, phase: Phase) -> list[dict[str, Any]]:
    """Freeze the parts with learning rate 0 and return optimizer parameter groups for the other parts.

    A group stores its learning rate as `peak`, and its weight decay, which is 0 for biases and normalizations. If
    `phase.lora` is set, LoRA adapters are added first, and they are the only trainable parameters of the language
    model.
    """
    if phase.lora:
        lora.add(model.language, phase.lora)
    groups: dict[tuple[str, float, float], list[nn.Parameter]] = {}
    for part, rate in learning_rates(phase).items():
        for name, parameter in model.named_parameters():
            if model.part_of(name) == part:
                peak = rate if phase.lr_inherited is None or not is_inherited(name) else phase.lr_inherited
                parameter.requires_grad_(peak > 0 and (part != "language" or not phase.lora or lora.is_adapter(name)))
                if parameter.requires_grad:
                    decay = getattr(phase.weight_decay, part) if parameter.dim() > 1 else 0.0
                    groups.setdefault((part, peak, decay), []).append(parameter)
    return [{"params": parameters, "lr": 0.0, "peak": peak, "weight_decay": decay, "part": part}
            for (part, peak, decay), parameters in groups.items()]


def num_micro(phase: Phase, runtime: Runtime) -> int:
    """Return the number of micro-batches per step on each rank.

    Raises ValueError if the batch cannot be split evenly over the ranks and micro-batches.
    """
    rows_per_rank, rest = divmod(phase.batch_size, runtime.num_ranks)
    size = runtime.micro_batch_size or rows_per_rank
    if rest or not size or rows_per_rank % size:
        raise ValueError(f"runtime.yaml: batch_size {phase.batch_size} cannot be split evenly over {runtime.num_ranks} "
                         f"GPUs in micro-batches of {size}; change gpus, nodes or micro_batch_size")
    return rows_per_rank // size


def _deepspeed_config(phase: Phase, runtime: Runtime, *, bfloat16: bool) -> dict[str, Any]:
    offloaded = {"none": (), "optimizer": ("optimizer",), "all": ("optimizer", "param")}[runtime.offload]
    number = num_micro(phase, runtime)
    return {"train_batch_size": phase.batch_size,
            "train_micro_batch_size_per_gpu": phase.batch_size // runtime.num_ranks // number,
            "gradient_accumulation_steps": number, "gradient_clipping": phase.clip_norm,
            "zero_optimization": {"stage": runtime.zero_level} | {
                f"offload_{kind}": {"device": "cpu", "pin_memory": torch.cuda.is_available()} for kind in offloaded},
            "bf16": {"enabled": bfloat16}, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}


class Engine:
    """A DeepSpeed engine whose loss is exact: the mean over all answer tokens of a step, on all ranks together.

    If the setting `loss` of the phase is "samples", it is the mean over all rows of the means over their answer tokens.
    """

    def __init__(self, model: OneDiffForConditionalGeneration, phase: Phase, runtime: Runtime) -> None:
        start_process_group()
        import deepspeed

        self.rank, self.world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        if self.world != runtime.num_ranks:
            raise ValueError(f"runtime.yaml: nodes x gpus must equal the number of processes, but nodes x gpus is "
                             f"{runtime.num_ranks} and {self.world} processes were started; correct nodes or gpus")
        self.model, self.num_micro, self.zero_level = model, num_micro(phase, runtime), runtime.zero_level
        self.weights = auxiliary_weights(phase)
        self.weighs_samples = phase.loss == "samples"
        self.optimizer = torch.optim.AdamW(trainable(model, phase), betas=BETAS, fused=runtime.offload == "none")
        if runtime.checkpoint_activations:
            checkpoint_activations(model, phase, zero_level=runtime.zero_level)
        if runtime.compile:
            for block in model.language.get_decoder().layers:
                block.compile(dynamic=True)  # Batches differ in length, so the compiled code must accept any length.
        bfloat16 = next(model.parameters()).dtype == torch.bfloat16
        self._engine, *_ = deepspeed.initialize(model=model, optimizer=self.optimizer,
                                                config=_deepspeed_config(phase, runtime, bfloat16=bfloat16))
        limit_waits()
        self.device, self._plain_norm, self._pending = self._engine.device, float("nan"), False
        self.learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if self._updated is not None or hasattr(self._engine.optimizer, LINK):
            # DeepSpeed creates Adam moments at the first update, under ZeRO 1 and 2 only for parameters with gradients.
            self._make_moments()
        for state in self.optimizer.state.values():
            # In bfloat16 without ZeRO, DeepSpeed has already made one empty update, so the step counter is reset.
            state["step"].zero_()

    def set_rate(self, factor: float) -> None:
        """Set the learning rate of each parameter group to `factor` times its peak rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor

    def sums(self, numbers: list[Any]) -> Tensor:
        """Sum each of the numbers over all ranks, and return the sums in the order of `numbers`."""
        totals = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(totals)
        return totals

    def any_rank(self, *flags: bool) -> list[bool]:
        """Return for each flag whether at least one rank has set it, so that all ranks can take equal decisions."""
        return [total > 0 for total in self.sums(list(flags)).tolist()]

    def backward(self, batch: dict[str, Tensor], total_weight: Tensor, num_rows: Tensor) -> Tensor:
        """Run the forward and the backward pass on one micro-batch, and return what it adds to the losses of the step.

        The result holds the loss of the caption and then the auxiliary losses in the order of `self.weights`, without
        their weights. `total_weight` is the number of answer tokens, or of rows with an answer if every row counts
        equally. Both numbers are those of the step, on all ranks together.
        """
        if self._pending:
            # DeepSpeed counts micro-batches by calls of step(); the call after the last micro-batch updates weights.
            self._engine.step()
        self._pending = True
        on_device = {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}
        if self.weighs_samples:
            on_device["row_weights"] = 1 / (on_device["labels"][:, 1:] != IGNORED).sum(1).clamp(min=1)
        output = self._engine(**on_device, total_weight=total_weight, num_rows=num_rows)
        losses = torch.stack([output.loss, *(output[name] for name in self.weights)])
        loss = losses @ losses.new_tensor([1.0, *self.weights.values()])
        # DeepSpeed averages gradients over ranks and micro-batches. The two factors turn this average into a sum.
        self._engine.backward(loss * self.world * self.num_micro)
        return losses.detach()

    def step(self) -> None:
        """Update the weights. Call this after `backward` was called for all micro-batches of the step."""
        if self._plain:
            grads = [p.grad for p in self.learning.values() if p.grad is not None]
            self._plain_norm = float(torch.nn.utils.get_total_norm(grads)) if grads else float("nan")
        self._engine.step()
        self._pending = False

    @property
    def grad_norm(self) -> float:
        """The norm of the gradients of the last step, as it was before the gradients were clipped."""
        norm = self._engine.get_global_grad_norm()
        return self._plain_norm if norm is None else float(norm)

    def gather_texts(self, generate: Callable[[list[int]], list[str]], num: int) -> list[str]:
        """Generate a text for each number below `num`, distributed over the ranks, and return all texts on all ranks.

        `generate(numbers)` returns one text for each of its numbers. Every rank generates equally many texts, because
        under ZeRO 3 a rank that finishes early would leave the other ranks waiting forever.
        """
        each = -(-num // self.world)
        mine = generate([number % num for number in range(self.rank, each * self.world, self.world)])
        by_rank: list[list[str]] = [[] for _ in range(self.world)]
        torch.distributed.all_gather_object(by_rank, mine)
        return [by_rank[number % self.world][number // self.world] for number in range(num)]

    @property
    def _plain(self) -> bool:
        """Whether the optimizer updates the model's parameters directly, as it does in float32 without ZeRO."""
        return not hasattr(self._engine.optimizer, "optimizer") or self._engine.optimizer is self.optimizer

    @cached_property
    def _updated(self) -> dict[int, Tensor] | None:
        """A dict from `id(parameter)` to the tensor that the optimizer updates; None if ZeRO shards these tensors.

        The tensor is the parameter itself in float32 training, and a float32 copy of it in bfloat16 training.
        """
        if self._plain:
            return {id(p): p for p in self.learning.values()}
        if self.zero_level:
            return None
        wrapped = self._engine.optimizer
        return {id(low): high for lows, highs in zip(wrapped.fp16_groups, wrapped.fp32_groups, strict=True)
                for low, high in zip(lows, highs, strict=True)}

    def masters(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Yield the name of each trainable parameter with its complete float32 value and both Adam moments.

        All ranks must iterate together, because ZeRO gathers each tensor from all ranks.
        """
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        for name, p in self.learning.items():
            if self._updated is not None:
                master = self._updated[id(p)]
                yield name, {"value": master.detach(), **{key: self.optimizer.state[master][key] for key in MOMENTS}}
            else:
                yield name, {"value": safe_get_full_fp32_param(p),
                             **{key: safe_get_full_optimizer_state(p, key) for key in MOMENTS}}

    def set_masters(self, step: int, read: Callable[[str], dict[str, Tensor]]) -> None:
        """Load the parameters and Adam moments that `masters` yielded earlier, to resume training after `step` updates.

        `read(name)` returns the value and both moments of a parameter. Every rank reads every parameter and keeps only
        the share that ZeRO assigns to it.
        """
        self._make_moments()
        for name, p in self.learning.items():
            for key, value in read(name).items():
                self._set(p, key, value.to(self.device))
        for state in self.optimizer.state.values():
            state["step"].fill_(step)

    def _set(self, p: nn.Parameter, key: str, value: Tensor) -> None:
        """Copy the complete tensor `value` into a parameter (`key` is "value") or into one of its Adam moments."""
        from deepspeed.utils import (
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        if self._updated is not None:
            master = self._updated[id(p)]
            (master.data if key == "value" else self.optimizer.state[master][key]).copy_(value)
            if key == "value" and master is not p:
                p.data.copy_(value)
        elif hasattr(p, "ds_tensor"):  # Under ZeRO 3, each rank holds one slice of the flattened parameter.
            size = p.ds_tensor.ds_numel
            part = functional.pad(value.flatten(), (0, size * self.world - value.numel()))[size * self.rank :][:size]
            if key == "value":
                safe_set_local_fp32_param(p, part)
                p.ds_tensor.data.copy_(part)
            else:
                safe_set_local_optimizer_state(p, part, key)
        elif key == "value":
            safe_set_full_fp32_param(p, value)
            p.data.copy_(value)
        else:
            safe_set_full_optimizer_state(p, value, key)

    def _make_moments(self) -> None:
        """Create Adam's moments, which torch creates only at the first update, too late for a run that resumes."""
        flat = getattr(self._engine.optimizer, "fp32_partitioned_groups_flat", None)  # ZeRO 3
        for p in flat or [p for group in self.optimizer.param_groups for p in group["params"]]:
            state = self.optimizer.state[p]
            for key in MOMENTS:
                state.setdefault(key, torch.zeros_like(p))
            state.setdefault("step", torch.zeros((), device=p.device))
        if hasattr(self._engine.optimizer, LINK):
            getattr(self._engine.optimizer, LINK)()

    def learned_weights(self) -> dict[str, Tensor] | None:
        """Return the trainable parameters by name, in the model's precision, in CPU memory; None except on rank 0."""
        values = self._gather(self.learning.values())
        return None if self.rank else {name: values[id(p)] for name, p in self.learning.items()}

    def model_weights(self) -> dict[str, Tensor] | None:
        """Return all weights of the model by name, in CPU memory; None except on rank 0.

        A weight that two layers share is listed under both names.
        """
        values = self._gather(self.model.parameters())
        if self.rank:
            return None
        named = {name: values[id(p)] for name, p in self.model.named_parameters(remove_duplicate=False)}
        return {name: named.get(name, value) for name, value in self.model.state_dict().items()}

    def _gather(self, parameters: Iterable[nn.Parameter]) -> dict[int, Tensor]:
        """Return a dict from `id(parameter)` to the complete tensor on rank 0, and an empty dict on the other ranks.

        All ranks must call this, because a parameter that ZeRO shards is gathered from all ranks.
        """
        import deepspeed

        values: dict[int, Tensor] = {}
        for p in parameters:
            with deepspeed.zero.GatheredParameters([p]) if hasattr(p, "ds_id") else nullcontext():
                if self.rank == 0:
                    values[id(p)] = p.detach().to("cpu", copy=True)
        return values

    def close(self) -> None:
        self._engine.destroy()


def checkpoint_activations(model: OneDiffForConditionalGeneration, phase: Phase, *, zero_level: int) -> None:
    """Save memory: keep only the input of each transformer block and recompute the block in the backward pass."""
    # ZeRO 3 releases weights after the forward pass, and non-reentrant checkpointing rejects the changed shapes.
    options = {"use_reentrant": zero_level == 3}
    model.language.activation_checkpointing_enable(options)
    if phase.lr_vision:
        model.vision.tower.activation_checkpointing_enable(options)
