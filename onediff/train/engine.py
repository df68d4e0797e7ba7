"""How memory and work are shared between GPUs: DeepSpeed. The only file that imports it."""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from onediff.config import Phase, Runtime
from onediff.model.onediff import PARTS, OneDiffForConditionalGeneration
from onediff.train import lora

BETAS = (0.9, 0.999)
MOMENTS = ("exp_avg", "exp_avg_sq")
LINK = "_lazy_init_hp_params_optimizer_state"  # of ZeRO 1 and 2: where each parameter finds its moments


def start_process_group() -> None:
    """Joins the ranks that a launcher started; a process without a launcher becomes rank 0 of 1."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import deepspeed

    if torch.distributed.is_initialized():
        return
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
        # A store in memory opens no port, which another process could take between its choice and its use.
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]  # torch's stubs do not name it
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it compiles one, dying without a compiler
    deepspeed.init_distributed(backend, verbose=False)


def limit_waits() -> None:
    """DeepSpeed's further groups would wait half an hour (gloo) for a node that is gone; now as long as its first."""
    from deepspeed.constants import default_pg_timeout
    from torch.distributed import distributed_c10d

    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(default_pg_timeout, group)


def learning_rates(phase: Phase) -> dict[str, float]:
    """Part of the model -> its peak learning rate, in the order of the optimizer's parameter groups."""
    return {part: getattr(phase, f"lr_{part}") for part in PARTS}


def trainable(model: OneDiffForConditionalGeneration, phase: Phase) -> list[dict[str, Any]]:
    """Freezes what has learning rate 0; parameter groups of the rest, one per part, with its `peak` rate."""
    if phase.lora:
        lora.add(model.language, phase.lora)
    groups = []
    for part, rate in learning_rates(phase).items():
        named = [(name, p) for name, p in model.named_parameters() if model.part_of(name) == part]
        for name, parameter in named:
            parameter.requires_grad_(rate > 0 and (part != "language" or not phase.lora or lora.is_adapter(name)))
        if learning := [p for _, p in named if p.requires_grad]:
            groups.append({"params": learning, "lr": 0.0, "peak": rate, "part": part})
    return groups


def num_micro(phase: Phase, runtime: Runtime) -> int:
    """Micro-batches of each step and rank. Raises ValueError unless they divide the batch."""
    rows_per_rank, rest = divmod(phase.batch_size, runtime.num_ranks)
    size = runtime.micro_batch_size or rows_per_rank
    if rest or not size or rows_per_rank % size:
        raise ValueError(f"runtime.yaml: batch_size {phase.batch_size} does not split over {runtime.num_ranks} GPUs "
                         f"in micro-batches of {size}; change gpus, nodes or micro_batch_size")
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
    """DeepSpeed's engine with an exact loss: the sum over answer tokens divided by the step's count on all ranks."""

    def __init__(self, model: OneDiffForConditionalGeneration, phase: Phase, runtime: Runtime) -> None:
        start_process_group()
        import deepspeed

        self.rank, self.world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        if self.world != runtime.num_ranks:
            raise ValueError(f"runtime.yaml: nodes x gpus is {runtime.num_ranks}, but {self.world} processes were "
                             "started; make them agree")
        self.model, self.num_micro, self.zero_level = model, num_micro(phase, runtime), runtime.zero_level
        self.optimizer = torch.optim.AdamW(trainable(model, phase), betas=BETAS, weight_decay=phase.weight_decay,
                                           fused=runtime.offload == "none")
        if runtime.checkpoint_activations:
            checkpoint_activations(model, phase, zero_level=runtime.zero_level)
        if runtime.compile:
            for block in model.language.get_decoder().layers:
                block.compile(dynamic=True)  # one kernel for all blocks; row lengths stay dynamic
        bfloat16 = next(model.parameters()).dtype == torch.bfloat16
        self._engine, *_ = deepspeed.initialize(model=model, optimizer=self.optimizer,
                                                config=_deepspeed_config(phase, runtime, bfloat16=bfloat16))
        limit_waits()
        self.device, self._plain_norm, self._pending = self._engine.device, float("nan"), False
        self.learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if self._updated is not None or hasattr(self._engine.optimizer, LINK):
            self._make_moments()  # not all have a gradient yet, and ZeRO 1 and 2 would link the first part's alone
        for state in self.optimizer.state.values():
            state["step"].zero_()  # without ZeRO in bfloat16 DeepSpeed has made an update without gradients

    def set_rate(self, factor: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor

    def sums(self, numbers: list[Any]) -> Tensor:
        """Each number summed over all ranks."""
        totals = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(totals)
        return totals

    def any_rank(self, *flags: bool) -> list[bool]:
        """Whether each flag is set on any rank: all ranks must stop, or write a checkpoint, at the same step."""
        return [total > 0 for total in self.sums(list(flags)).tolist()]

    def backward(self, batch: dict[str, Tensor], num_answer_tokens: Tensor) -> Tensor:
        """Runs forward and backward on one micro-batch; returns its share of the step's loss on this rank."""
        if self._pending:
            self._engine.step()  # DeepSpeed counts micro-batches here, and updates at the last one only
        self._pending = True
        on_device = {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}
        loss = self._engine(**on_device, num_answer_tokens=num_answer_tokens).loss
        self._engine.backward(loss * self.world * self.num_micro)  # DeepSpeed averages over both; here they add up
        return loss.detach()

    def step(self) -> None:
        """The update, after the last micro-batch."""
        if self._plain:
            grads = [p.grad for p in self.learning.values() if p.grad is not None]
            self._plain_norm = float(torch.nn.utils.get_total_norm(grads)) if grads else float("nan")
        self._engine.step()
        self._pending = False

    @property
    def grad_norm(self) -> float:
        """Of the last step, before clipping. Under ZeRO the gradients are DeepSpeed's, and so is the norm."""
        norm = self._engine.get_global_grad_norm()
        return self._plain_norm if norm is None else float(norm)

    def gather_texts(self, generate: Callable[[list[int]], list[str]], num: int) -> list[str]:
        """generate(numbers) -> a text for each; the numbers below `num` are shared between the ranks, and all ranks get
        all texts, in order.

        Each rank generates equally many texts, because under ZeRO 3 the ranks would wait for one another.
        """
        each = -(-num // self.world)
        mine = generate([number % num for number in range(self.rank, each * self.world, self.world)])
        by_rank: list[list[str]] = [[] for _ in range(self.world)]
        torch.distributed.all_gather_object(by_rank, mine)
        return [by_rank[number % self.world][number // self.world] for number in range(num)]

    # --- what a checkpoint and a model folder hold: whole tensors, however they are shared --------------------------

    @property
    def _plain(self) -> bool:
        """Whether the optimizer updates the parameters themselves: no ZeRO, no bfloat16."""
        return not hasattr(self._engine.optimizer, "optimizer") or self._engine.optimizer is self.optimizer

    @cached_property
    def _updated(self) -> dict[int, Tensor] | None:
        """id of each parameter -> what the optimizer updates for it: itself, or without ZeRO in bfloat16 its float32
        copy; None where ZeRO shares them.
        """
        if self._plain:
            return {id(p): p for p in self.learning.values()}
        if self.zero_level:
            return None
        wrapped = self._engine.optimizer
        return {id(low): high for lows, highs in zip(wrapped.fp16_groups, wrapped.fp32_groups, strict=True)
                for low, high in zip(lows, highs, strict=True)}

    def masters(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """For each parameter that learns: its complete float32 value and both moments, on all ranks."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        for name, p in self.learning.items():
            if self._updated is not None:
                master = self._updated[id(p)]
                yield name, {"value": master.detach(), **{key: self.optimizer.state[master][key] for key in MOMENTS}}
            else:
                yield name, {"value": safe_get_full_fp32_param(p),
                             **{key: safe_get_full_optimizer_state(p, key) for key in MOMENTS}}

    def set_masters(self, step: int, read: Callable[[str], dict[str, Tensor]]) -> None:
        """The reverse of `masters`; `step` updates were made. Every rank reads every parameter and keeps its share."""
        self._make_moments()
        for name, p in self.learning.items():
            for key, value in read(name).items():
                self._set(p, key, value.to(self.device))
        for state in self.optimizer.state.values():
            state["step"].fill_(step)

    def _set(self, p: nn.Parameter, key: str, value: Tensor) -> None:
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
        elif hasattr(p, "ds_tensor"):  # ZeRO 3: this rank's slice, the last one padded
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
        """Adam's moments come with its first step; a resumed run needs them before."""
        flat = getattr(self._engine.optimizer, "fp32_partitioned_groups_flat", None)  # ZeRO 3
        for p in flat or [p for group in self.optimizer.param_groups for p in group["params"]]:
            state = self.optimizer.state[p]
            for key in MOMENTS:
                state.setdefault(key, torch.zeros_like(p))
            state.setdefault("step", torch.zeros((), device=p.device))
        if hasattr(self._engine.optimizer, LINK):
            getattr(self._engine.optimizer, LINK)()

    def learned_weights(self) -> dict[str, Tensor] | None:
        """What learns, in the model's precision, in the CPU's memory of rank 0; None on the other ranks."""
        values = self._gather(self.learning.values())
        return None if self.rank else {name: values[id(p)] for name, p in self.learning.items()}

    def model_weights(self) -> dict[str, Tensor] | None:
        """As learned_weights, but of the complete model, where a weight that two layers share has two names."""
        values = self._gather(self.model.parameters())
        if self.rank:
            return None
        named = {name: values[id(p)] for name, p in self.model.named_parameters(remove_duplicate=False)}
        return {name: named.get(name, value) for name, value in self.model.state_dict().items()}

    def _gather(self, parameters: Iterable[nn.Parameter]) -> dict[int, Tensor]:
        """id of each parameter -> its complete value. All ranks take part; only rank 0 gets values."""
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
    """Blocks keep their inputs alone and are run again in the backward pass."""
    # Under ZeRO 3 a block's weights are gone by then, which the other kind takes for a change of shape.
    options = {"use_reentrant": zero_level == 3}
    model.language.activation_checkpointing_enable(options)
    if phase.lr_vision:
        model.vision.tower.activation_checkpointing_enable(options)
