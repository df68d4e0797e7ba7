"""How memory and work are shared between GPUs: DeepSpeed. The only file that imports it."""

from __future__ import annotations

import os
import socket
from typing import Any

import torch
from torch import Tensor

from onediff.config import Phase, Runtime
from onediff.model.onediff import OneDiffForConditionalGeneration

BETAS = (0.9, 0.999)


def start_process_group() -> None:
    """One process needs no launcher: it becomes rank 0 of 1."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import deepspeed

    if torch.distributed.is_initialized():
        return
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it compiles one, dying without a compiler
    deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo", verbose=False)


def trainable(model: OneDiffForConditionalGeneration, phase: Phase) -> list[dict[str, Any]]:
    """Freezes what has learning rate 0; parameter groups of the rest, one per part, with its `peak` rate."""
    groups = []
    for part, rate in phase.learning_rates.items():
        mine = [p for name, p in model.named_parameters() if model.part_of(name) == part]
        for parameter in mine:
            parameter.requires_grad_(rate > 0)
        if rate > 0 and mine:
            groups.append({"params": mine, "lr": rate, "peak": rate, "part": part})
    return groups


class Engine:
    """DeepSpeed's engine with an exact loss: the sum over answer tokens divided by the step's count on all ranks."""

    def __init__(self, model: OneDiffForConditionalGeneration, phase: Phase, runtime: Runtime, *,
                 micro_batches: int) -> None:
        start_process_group()
        import deepspeed

        self.model, self.micro_batches = model, micro_batches
        self.optimizer = torch.optim.AdamW(trainable(model, phase), betas=BETAS, weight_decay=phase.weight_decay)
        self.rank, self.world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        half = next(model.parameters()).dtype == torch.bfloat16
        self._engine, *_ = deepspeed.initialize(model=model, optimizer=self.optimizer, config={
            "train_batch_size": phase.batch_size,
            "train_micro_batch_size_per_gpu": phase.batch_size // self.world // micro_batches,
            "gradient_accumulation_steps": micro_batches, "gradient_clipping": phase.clip_norm,
            "zero_optimization": {"stage": runtime.zero_level}, "bf16": {"enabled": half},
            "zero_allow_untested_optimizer": True})
        self.device, self._own_norm, self._pending = self._engine.device, float("nan"), False

    def set_rate(self, factor: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor

    def count_on_all_ranks(self, number: int) -> Tensor:
        total = torch.tensor(float(number), device=self.device)
        torch.distributed.all_reduce(total)
        return total

    def backward(self, batch: dict[str, Tensor], num_answer_tokens: Tensor) -> Tensor:
        """Forward and backward of one micro-batch; returns its share of the step's loss on this rank."""
        if self._pending:
            self._engine.step()  # DeepSpeed counts micro-batches here, and updates at the last one only
        self._pending = True
        loss = self._engine(**batch, num_answer_tokens=num_answer_tokens).loss
        self._engine.backward(loss * self.world * self.micro_batches)  # DeepSpeed averages over both; here they add up
        return loss.detach()

    def step(self) -> None:
        """The update, after the last micro-batch."""
        grads = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        self._own_norm = float(torch.nn.utils.get_total_norm(grads)) if grads else float("nan")
        self._engine.step()
        self._pending = False

    def sum_on_all_ranks(self, value: Tensor) -> float:
        torch.distributed.all_reduce(value)
        return float(value)

    @property
    def grad_norm(self) -> float:
        """Of the last step, before clipping. Under ZeRO the gradients are DeepSpeed's, and so is the norm."""
        norm = self._engine.get_global_grad_norm()
        return self._own_norm if norm is None else float(norm)

    def save(self, folder: str, tag: str) -> None:
        self._engine.save_checkpoint(folder, tag=tag, save_latest=False, exclude_frozen_parameters=True)

    def load(self, folder: str, tag: str) -> None:
        self._engine.load_checkpoint(folder, tag=tag, load_module_strict=False)

    def close(self) -> None:
        self._engine.destroy()
