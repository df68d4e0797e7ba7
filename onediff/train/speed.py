"""How fast training goes, step by step: pairs, tokens, waiting, memory, and the share of the hardware's peak."""

from __future__ import annotations

import resource
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from onediff.inputs.processing import IGNORED

WINDOW_S = 30.0  # rates are of the last half minute
COUNTED = ("rows", "images", "pairs", "tokens", "padded_tokens", "answer_tokens")


def counts_of(batches: list[dict[str, Tensor]]) -> list[float]:
    """COUNTED of a rank's micro-batches: rows, images, rows with two, tokens that the language model reads, tokens that
    padded rows would have, answer tokens."""
    found: Counter[str] = Counter()
    for batch in batches:
        counts, mask = batch["image_counts"], batch["attention_mask"]
        found.update(rows=len(counts), images=int(counts.sum()), pairs=int((counts == 2).sum()), tokens=int(mask.sum()),
                     padded_tokens=mask.numel(), answer_tokens=int((batch["labels"][:, 1:] != IGNORED).sum()))
    return [float(found[name]) for name in COUNTED]


@dataclass
class Meter:
    """What all ranks did; flops_of(counts) gives the FLOPs behind COUNTED, `peak_flops` what all GPUs could do in 1 s.
    """

    flops_of: Callable[[dict[str, float]], float] | None = None
    peak_flops: float | None = None
    done: Counter[str] = field(default_factory=Counter)
    marks: deque[tuple[float, Counter[str]]] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.started = time.monotonic()
        self.marks.append((self.started, Counter()))

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def add(self, totals: Tensor, waited_s: float) -> None:
        """totals: `counts_of` summed over all ranks."""
        counts = dict(zip(COUNTED, totals.tolist(), strict=True))
        self.done.update({"steps": 1, "waited_s": waited_s, "flops": self.flops_of(counts) if self.flops_of else 0.0,
                          **counts})

    def line(self) -> dict[str, float]:
        """Rates over the last WINDOW_S seconds."""
        now = time.monotonic()
        self.marks.append((now, self.done.copy()))
        while len(self.marks) > 2 and now - self.marks[1][0] > WINDOW_S:
            self.marks.popleft()
        return self._rates(*self.marks[0])

    def summary(self) -> dict[str, float]:
        """Rates over the whole run."""
        return self._rates(self.started, Counter())

    def _rates(self, since: float, before: Counter[str]) -> dict[str, float]:
        seconds = max(time.monotonic() - since, 1e-9)
        did = {name: value - before[name] for name, value in self.done.items()}
        rates = {"pairs_per_s": did.get("rows", 0) / seconds, "tokens_per_s": did.get("tokens", 0) / seconds,
                 "padding_share": 1 - did.get("tokens", 0) / max(did.get("padded_tokens", 0), 1),
                 "loader_wait_share": did.get("waited_s", 0) / seconds, "memory_gib": memory_gib()}
        if self.flops_of:
            rates["tflops_per_s"] = did.get("flops", 0) / seconds / 1e12
        if self.flops_of and self.peak_flops:
            rates["mfu"] = did.get("flops", 0) / seconds / self.peak_flops
        return rates


def memory_gib() -> float:
    """The most that this process has held: of the GPU's memory where there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
