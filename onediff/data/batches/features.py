"""The tower's features of images that no longer change, computed once.

Shapes:  M images, L levels, N patches, C tower width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from onediff.data.batches.corpus import Corpus, held
from onediff.inputs.images import open_image
from onediff.inputs.processing import OneDiffProcessor

FEATURE_BATCH = 64


class FeatureStore:
    """The states (L, N, C) of a frozen tower for every image of some sources, computed once and kept in scratch."""

    def __init__(self, arrays: dict[str, NDArray[np.float32]], rows: dict[str, tuple[str, int]]) -> None:
        self.arrays, self.rows = arrays, rows

    def __call__(self, names: list[str]) -> dict[str, Tensor]:
        found = [self.rows[name] for name in names]
        shape = next(iter(self.arrays.values())).shape[1:]
        states = np.empty((len(names), *shape), dtype=np.float32)
        for state, (source, row) in zip(states, found, strict=True):
            state[:] = self.arrays[source][row]
        return {"states": torch.from_numpy(states)}

    @classmethod
    def prepare(cls, corpus: Corpus, processor: OneDiffProcessor, tower: Callable[[Tensor], Tensor], *,
                sources: list[str], tower_digest: str, scratch: Path) -> FeatureStore:
        """tower maps images (M, 3, H, W) to states (M, L, N, C)."""
        arrays: dict[str, NDArray[np.float32]] = {}
        rows: dict[str, tuple[str, int]] = {}
        for source in sources:
            names = corpus.images_of(source)
            if not names:
                continue  # conversations without images
            key = hashlib.sha256(json.dumps([tower_digest, names]).encode()).hexdigest()[:16]
            path = scratch / "features" / f"{source}-{key}.npy"
            with held(path.with_suffix(".lock")):
                if not path.exists():
                    write_features(path, corpus, processor, tower, names=names)
            arrays[source] = np.load(path, mmap_mode="r")
            rows |= {name: (source, row) for row, name in enumerate(names)}
        return cls(arrays, rows)


def write_features(path: Path, corpus: Corpus, processor: OneDiffProcessor, tower: Callable[[Tensor], Tensor], *,
                   names: list[str]) -> None:
    """Appears whole or not at all."""
    part = path.with_suffix(".part")
    store = None
    with (torch.inference_mode(),
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
    part.rename(path)
