"""How the rows of a step become the tensors of a rank.

Shapes:  M images, L levels, N patches, C tower width.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from onediff import interrupts
from onediff.data.batches.corpus import Corpus
from onediff.data.batches.sampling import BatchRow
from onediff.files import key_of, new_file, waiting_lock
from onediff.inputs.images import open_image
from onediff.inputs.processing import OneDiffProcessor

FEATURE_BATCH = 64

Pixels = Callable[[list[str]], dict[str, Tensor]]  # digests of images -> what the model reads of them
Batch = dict[str, Tensor]


def shared_out(rows: list[BatchRow], parts: int, *, tokens_per_image: int) -> list[list[BatchRow]]:
    """Splits the rows into `parts` with equally many rows and about as many tokens, so that no rank waits for another.

    Longest first, dealt out to and fro. The part of a row changes no result, because the loss is a sum over all rows.
    """
    def length(row: BatchRow) -> int:
        words = sum(len(text) for turn in row.prompt.later for text in turn)
        return len(row.images) * tokens_per_image + (len(row.prompt.question + (row.prompt.answer or "")) + words) // 4

    if parts == 1:
        return [rows]
    ordered = sorted(rows, key=length, reverse=True)
    return [[ordered[turn * parts + (part if turn % 2 == 0 else parts - 1 - part)]
             for turn in range(len(rows) // parts)] for part in range(parts)]


def collate(rows: list[BatchRow], processor: OneDiffProcessor, pixels_of: Pixels) -> Batch:
    """Rows -> what the model's `forward` takes."""
    batch = processor.answers([row.prompt for row in rows])
    batch |= pixels_of([name for row in rows for name in row.images])
    if any(row.masked for row in rows):
        batch["patch_mask"] = torch.tensor([row.masked for row in rows])
    return batch


def decode(corpus: Corpus, processor: OneDiffProcessor) -> Pixels:
    """Images as pixels, for a tower that learns, or that sees too many to keep its features."""
    return lambda names: {"images": processor.pixels([open_image(corpus.files[name]) for name in names])}


class FeatureStore:
    """The states (L, N, C) of a frozen tower for every image of a corpus, computed once and kept in scratch."""

    def __init__(self, arrays: dict[str, NDArray[np.float32]], rows: dict[str, tuple[str, int]]) -> None:
        self.arrays, self.rows = arrays, rows

    def __call__(self, names: list[str]) -> dict[str, Tensor]:
        shape = next(iter(self.arrays.values())).shape[1:]
        states = np.empty((len(names), *shape), dtype=np.float32)
        for state, name in zip(states, names, strict=True):
            source, row = self.rows[name]
            state[:] = self.arrays[source][row]
        return {"states": torch.from_numpy(states)}

    @classmethod
    def prepare(cls, corpus: Corpus, processor: OneDiffProcessor, tower: Callable[[Tensor], Tensor], *,
                tower_digest: str, scratch: Path) -> FeatureStore:
        """tower maps images (M, 3, H, W) to states (M, L, N, C)."""
        names_of: dict[str, list[str]] = defaultdict(list)
        for name, source in sorted(corpus.source_of.items()):
            names_of[source].append(name)
        arrays: dict[str, NDArray[np.float32]] = {}
        for source, names in names_of.items():
            path = scratch / "features" / f"{source}-{key_of([tower_digest, names])[:16]}.npy"
            with waiting_lock(path.with_suffix(".lock")):
                if not path.exists():
                    write_features(path, corpus, processor, tower, names=names)
            arrays[source] = np.load(path, mmap_mode="r")
        return cls(arrays, {name: (source, row) for source, names in names_of.items()
                            for row, name in enumerate(names)})


def write_features(path: Path, corpus: Corpus, processor: OneDiffProcessor, tower: Callable[[Tensor], Tensor], *,
                   names: list[str]) -> None:
    store = None
    with (torch.inference_mode(), new_file(path) as part,
          tqdm(total=len(names), desc=f"features {path.stem.split('-')[0]}", unit="image") as progress):
        for start in range(0, len(names), FEATURE_BATCH):
            chunk = names[start : start + FEATURE_BATCH]
            states = tower(processor.pixels([open_image(corpus.files[name]) for name in chunk])).float().cpu().numpy()
            if store is None:
                store = np.lib.format.open_memmap(part, mode="w+", dtype=np.float32,
                                                  shape=(len(names), *states.shape[1:]))
            store[start : start + len(chunk)] = states
            progress.update(len(chunk))
        assert store is not None, "a source in the corpus has images"
        store.flush()


def stream(batches_of: Callable[[int], list[Batch]], steps: range, *, workers: int, pin: bool) -> Iterator[list[Batch]]:
    """batches_of(step) for each step in order; with workers, ahead of time and beside the training."""
    def ignore_signals(worker: int) -> None:
        """So that the rank still gets batches until it has written its checkpoint. Workers end when the rank ends."""
        interrupts.ignore()

    return iter(DataLoader(steps, batch_size=None, collate_fn=batches_of,  # type: ignore[arg-type]  # a range will do
                           num_workers=workers, pin_memory=pin,
                           prefetch_factor=2 if workers else None, multiprocessing_context="fork" if workers else None,
                           worker_init_fn=ignore_signals))
