"""Keeps the drawn examples on disk, so that an interrupted `make backbones` does not draw them again."""

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from onediff.train.pretrain.examples import Example, make_example

SHARD = 1000  # number of examples in one file


@dataclass(frozen=True)
class Examples:
    """The fields of class Example for M examples: one array with M rows for each field, and a list of captions."""

    image: NDArray[np.uint8]
    attributes: NDArray[np.int8]
    present: NDArray[np.uint8]
    offsets: NDArray[np.float16]
    light: NDArray[np.float16]
    caption: NDArray[np.str_]

    @classmethod
    def of(cls, examples: Sequence[Example]) -> Self:
        return cls(**{field.name: np.stack([getattr(example, field.name) for example in examples])
                      for field in fields(cls)})

    def __len__(self) -> int:
        return len(self.image)


def draw_shards(folder: Path, count: int, *, workers: int) -> None:
    """Draw the first `count` examples, a multiple of SHARD, into files in `folder`; files that exist are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [number for number in range(count // SHARD) if not shard_path(folder, number).exists()]
    with ProcessPoolExecutor(workers) as pool:
        list(tqdm(pool.map(partial(_draw_shard, folder), missing), total=len(missing), desc="images",
                  unit=f" x {SHARD} images"))


def _draw_shard(folder: Path, number: int) -> None:
    examples = Examples.of([make_example(seed) for seed in range(number * SHARD, (number + 1) * SHARD)])
    part = shard_path(folder, number).with_suffix(".part")
    with part.open("wb") as file:
        np.savez(file, **vars(examples))
    os.replace(part, shard_path(folder, number))


def read_shards(folder: Path, count: int) -> Examples:
    """Read the first `count` examples, a multiple of SHARD, into memory."""
    shards = [np.load(shard_path(folder, number)) for number in range(count // SHARD)]
    return Examples(**{field.name: np.concatenate([shard[field.name] for shard in shards])
                       for field in fields(Examples)})


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"examples-{number:04d}.npz"
