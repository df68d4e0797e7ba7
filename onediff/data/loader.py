"""From DiffCap records to batches: which samples a step sees, and the tower's features of images that no longer change.

Everything is a pure function of (seed, step), so a resumed run sees the very batches that an uninterrupted one would
have seen.
Shapes:  M images in the batch, L levels, N patches, C tower width.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from onediff.data.mixture import Mixture, source_turns
from onediff.data.record import digest, read_records
from onediff.inputs.images import open_image
from onediff.inputs.processing import OneDiffProcessor
from onediff.inputs.prompt import Prompt, conversation_prompt, coupled_prompt, pair_prompt

FEATURE_BATCH = 64
CANDIDATES = 4  # images among which Coupled Sample Training seeks the least alike


@dataclass(frozen=True)
class Sample:
    """A record without its pixels: images by digest, in order; `turns` are a conversation's, empty for a pair."""

    source: str
    images: tuple[str, ...]
    references: list[str]
    instruction: str
    turns: tuple[tuple[str, str], ...] = ()


@dataclass
class Corpus:
    """The records of one split without decoded pixels: samples, and each image file once, by digest."""

    samples: list[Sample] = field(default_factory=list)
    captions: dict[str, dict[str, str]] = field(default_factory=dict)  # source -> image digest -> its own caption
    files: dict[str, bytes] = field(default_factory=dict)
    source_of: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path, split: str, sources: Iterable[str]) -> Corpus:
        """Raises ValueError if a source has nothing in the split."""
        corpus, wanted = cls(), set(sources)
        for record in read_records(folder, f"{split}-*.parquet"):
            if record.source not in wanted:
                continue
            names = tuple(digest(content) for content in record.images)
            captions = record.provenance.get("captions", [None] * len(names))
            for name, content, caption in zip(names, record.images, captions, strict=True):
                corpus.files[name] = content
                corpus.source_of[name] = record.source
                if caption:
                    corpus.captions.setdefault(record.source, {})[name] = caption
            turns = tuple((asked, said) for asked, said in record.provenance.get("conversation", ()))
            corpus.samples.append(Sample(record.source, names, record.references, record.instruction, turns))
        for source in sorted(wanted - {sample.source for sample in corpus.samples}):
            raise ValueError(f"{folder}: source '{source}' has no pair in split {split}; raise its number of pairs "
                             "or leave it out")
        return corpus

    def images_of(self, source: str) -> list[str]:
        return sorted(name for name, its in self.source_of.items() if its == source)


# --- which samples a step sees ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One row of a batch: its images by digest, in order, and its prompt."""

    images: tuple[str, ...]
    prompt: Prompt
    masked: bool = False


def tune_rows(corpus: Corpus, weights: dict[str, float], template: str, *, seed: int, batch_size: int,
              mask_patches: float) -> Callable[[int], list[Row]]:
    """Multi-task instruction tuning: sources by weight, each without replacement per epoch.

    One reference is drawn per visit of a pair; a conversation is read whole.
    """
    by_source: dict[str, list[int]] = {name: [] for name in sorted(weights)}
    for index, sample in enumerate(corpus.samples):
        if sample.source in by_source:
            by_source[sample.source].append(index)
    mixture = Mixture(by_source, weights, seed)

    def row(sample: Sample, rng: Generator) -> Row:
        if len(sample.images) == 2:
            prompt = pair_prompt(template, sample.instruction, choose(rng, sample.references))
            return Row(sample.images, prompt, bool(rng.random() < mask_patches))
        turns = list(sample.turns) or [(sample.instruction, choose(rng, sample.references))]
        return Row(sample.images, conversation_prompt(template, turns, num_images=len(sample.images)))

    def rows(step: int) -> list[Row]:
        rng = np.random.default_rng([seed, 11, step])
        return [row(corpus.samples[index], rng) for index in mixture.batch(step, batch_size)]

    return rows


def coupled_rows(corpus: Corpus, weights: dict[str, float], template: str, *, seed: int, batch_size: int,
                 mask_patches: float) -> Callable[[int], list[Row]]:
    """Coupled Sample Training: single image-caption samples, two unlike ones of a source made into one pseudo pair.

    Raises ValueError if a source has fewer than two images with a caption of their own.
    """
    for source in weights:
        if len(corpus.captions.get(source, ())) < 2:
            raise ValueError(f"params.yaml: align.mixture: source '{source}' has no captions of single images "
                             "to couple; choose a source that has them")
    names_of = {source: sorted(corpus.captions[source]) for source in weights}
    turns = source_turns(weights)

    def row(rng: Generator, source: str) -> Row:
        names, captions = names_of[source], corpus.captions[source]
        first, *others = (names[int(i)] for i in rng.integers(len(names), size=1 + CANDIDATES))
        words = _words(captions[first])
        second = min(others, key=lambda name: len(_words(captions[name]) & words))
        return Row((first, second), coupled_prompt(template, captions[first], captions[second]),
                   bool(rng.random() < mask_patches))

    def rows(step: int) -> list[Row]:
        rng = np.random.default_rng([seed, 13, step])
        return [row(rng, turns[slot % len(turns)]) for slot in range(step * batch_size, (step + 1) * batch_size)]

    return rows


def _words(caption: str) -> frozenset[str]:
    return frozenset(caption.replace(",", "").split())


def choose(rng: Generator, options: list[str]) -> str:
    return options[int(rng.integers(len(options)))]


# --- rows to tensors --------------------------------------------------------------------------------------------------


def collate(rows: list[Row], processor: OneDiffProcessor,
            pixels_of: Callable[[list[str]], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Rows -> what the model's `forward` takes."""
    batch = processor.answers([row.prompt for row in rows])
    names = [name for row in rows for name in row.images]
    batch |= pixels_of(names) if names else {}
    if any(row.masked for row in rows):
        batch["patch_mask"] = torch.tensor([row.masked for row in rows])
    return batch


def decode(corpus: Corpus, processor: OneDiffProcessor) -> Callable[[list[str]], dict[str, Tensor]]:
    """Images as pixels, for a tower that learns."""
    return lambda names: {"images": processor.pixels([open_image(corpus.files[name]) for name in names])}


class FeatureStore:
    """The states (L, N, C) of a frozen tower for every image of some sources, computed once and kept in scratch."""

    def __init__(self, arrays: dict[str, NDArray[np.float32]], rows: dict[str, tuple[str, int]]) -> None:
        self.arrays, self.rows = arrays, rows

    def __call__(self, names: list[str]) -> dict[str, Tensor]:
        found = [self.rows[name] for name in names]
        return {"states": torch.from_numpy(np.stack([self.arrays[source][row] for source, row in found]))}

    @classmethod
    def prepare(cls, corpus: Corpus, processor: OneDiffProcessor, tower: Callable[[Tensor], Tensor], *,
                sources: list[str], tower_digest: str, scratch: Path) -> FeatureStore:
        """tower maps images (M, 3, H, W) to states (M, L, N, C)."""
        arrays: dict[str, NDArray[np.float32]] = {}
        rows: dict[str, tuple[str, int]] = {}
        for source in sources:
            names = corpus.images_of(source)
            key = hashlib.sha256(json.dumps([tower_digest, names]).encode()).hexdigest()[:16]
            path = scratch / "features" / f"{source}-{key}.npy"
            if not path.exists():
                write_features(path, corpus, processor, tower, names=names)
            arrays[source] = np.load(path, mmap_mode="r")
            rows |= {name: (source, row) for row, name in enumerate(names)}
        return cls(arrays, rows)


def write_features(path: Path, corpus: Corpus, processor: OneDiffProcessor, tower: Callable[[Tensor], Tensor], *,
                   names: list[str]) -> None:
    """Appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
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
