"""Training speed at each step: pairs and tokens per second, loader waiting time, memory, model FLOPs utilization."""

import resource
import time
from collections import Counter, deque
from collections.abc import Callable

import torch
from torch import Tensor

from onediff.inputs.processing import IGNORED

WINDOW_S = 30.0
COUNTED = ("rows", "images", "pairs", "tokens", "padded_tokens", "answer_tokens", "answered_rows")


def counts_of(batches: list[dict[str, Tensor]]) -> list[float]:
    """Count rows, images, pairs and tokens in the micro-batches of one rank, in the order of COUNTED.

    `pairs` counts the rows with two images, `tokens` the tokens without padding, and `padded_tokens` the tokens of
    rows that are padded to equal length. `answered_rows` counts the rows with at least one answer token; a row has none
    if its answer does not fit into model.max_length.
    """
    totals: Counter[str] = Counter()
    for batch in batches:
        counts, mask, is_answer = batch["image_counts"], batch["attention_mask"], batch["labels"][:, 1:] != IGNORED
        totals.update(rows=len(counts), images=int(counts.sum()), pairs=int((counts == 2).sum()),
                      tokens=int(mask.sum()), padded_tokens=mask.numel(),
                      answer_tokens=int(is_answer.sum()), answered_rows=int(is_answer.any(1).sum()))
    return [float(totals[name]) for name in COUNTED]


class Meter:
    """Measures the training speed of all ranks together.

    `flops_of(counts)` returns the FLOPs of training steps that process these counts; the keys of `counts` are COUNTED.
    `peak_flops` is the peak speed of all GPUs together in FLOP/s, or None if it is unknown.
    """

    def __init__(self, flops_of: Callable[[dict[str, float]], float], peak_flops: float | None) -> None:
        self.flops_of, self.peak_flops = flops_of, peak_flops
        self.started, self.totals = time.monotonic(), Counter[str]()
        self.marks = deque([(self.started, Counter[str]())])

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def add(self, totals: Tensor, waited_s: float) -> None:
        """Record that one training step has ended; `totals` has the counts of the step, summed over all ranks."""
        counts = dict(zip(COUNTED, totals.tolist(), strict=True))
        self.totals.update({"steps": 1, "waited_s": waited_s, "flops": self.flops_of(counts), **counts})

    def line(self) -> dict[str, float]:
        """Return the speed figures of the last WINDOW_S seconds of training, such as tokens per second."""
        now = time.monotonic()
        self.marks.append((now, self.totals.copy()))
        while len(self.marks) > 2 and now - self.marks[1][0] > WINDOW_S:
            self.marks.popleft()
        return self._rates(*self.marks[0])

    def summary(self) -> dict[str, float]:
        """Return the speed figures of the complete run, such as tokens per second."""
        return self._rates(self.started, Counter())

    def _rates(self, since: float, before: Counter[str]) -> dict[str, float]:
        seconds = max(time.monotonic() - since, 1e-9)
        new = {name: self.totals[name] - before[name] for name in ("waited_s", "flops", *COUNTED)}
        rates = {"pairs_per_s": new["rows"] / seconds, "tokens_per_s": new["tokens"] / seconds,
                 "padding_share": 1 - new["tokens"] / max(new["padded_tokens"], 1),
                 "loader_wait_share": new["waited_s"] / seconds, "memory_gib": memory_gib(),
                 "tflops_per_s": new["flops"] / seconds / 1e12}
        return rates | ({"mfu": new["flops"] / seconds / self.peak_flops} if self.peak_flops else {})


def memory_gib() -> float:
    """Return the peak memory of this process in GiB: GPU memory if there is a GPU, else main memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
