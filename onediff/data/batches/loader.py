"""Which samples a step sees, and how they become the tensors of a rank.

Everything is a pure function of (seed, step), so a resumed run sees the very batches that an uninterrupted one would
have seen, on whatever number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from onediff import interrupts
from onediff.config import Task
from onediff.data.batches.corpus import Corpus, Sample
from onediff.data.batches.mixture import Mixture, source_turns
from onediff.inputs.images import open_image
from onediff.inputs.processing import OneDiffProcessor
from onediff.inputs.prompt import Prompt, conversation_prompt, coupled_prompt, pair_prompt, single_prompt

CANDIDATES = 4  # images among which Coupled Sample Training seeks the least alike
SINGLE_INSTRUCTION = "Describe the image."
AS_RECORDED = Task(instruction=None, targets="drawn", max_new_tokens=None, num_beams=None)


@dataclass(frozen=True)
class Row:
    """One row of a batch: its images by digest, in order, its prompt, and the name that a failure tells."""

    images: tuple[str, ...]
    prompt: Prompt
    masked: bool = False
    name: str = ""


Rows = Callable[[int], list[Row]]
Pixels = Callable[[list[str]], dict[str, Tensor]]
Batch = dict[str, Tensor]


# --- which samples a step sees ----------------------------------------------------------------------------------------


def tune_entries(corpus: Corpus, weights: dict[str, float], tasks: dict[str, Task]) -> list[tuple[Sample, str | None]]:
    """What an epoch visits once: a sample with its answer, None where a reference is drawn at each visit."""
    entries: list[tuple[Sample, str | None]] = []
    for sample in corpus.samples:
        if sample.source not in weights:
            continue
        targets = tasks.get(sample.source, AS_RECORDED).targets
        if targets == "each" and not sample.turns:
            entries += [(sample, reference) for reference in sample.references]
        elif targets == "joined" and not sample.turns:
            entries.append((sample, " ".join(sample.references)))
        else:
            entries.append((sample, None))
    return entries


def tune_rows(entries: list[tuple[Sample, str | None]], weights: dict[str, float], tasks: dict[str, Task],
              template: str, *, seed: int, batch_size: int, mask_patches: float) -> Rows:
    """Multi-task instruction tuning: sources by weight, each without replacement per epoch.

    A conversation is read whole.
    """
    by_source: dict[str, list[int]] = {name: [] for name in sorted(weights)}
    for index, (sample, _) in enumerate(entries):
        by_source[sample.source].append(index)
    mixture = Mixture(by_source, weights, seed)

    def row(sample: Sample, answer: str | None, rng: Generator) -> Row:
        asked = tasks.get(sample.source, AS_RECORDED).instruction or sample.instruction
        name = f"{sample.source}/{sample.pair_id}"
        if len(sample.images) == 2:
            prompt = pair_prompt(template, asked, answer or choose(rng, sample.references))
            return Row(sample.images, prompt, bool(rng.random() < mask_patches), name)
        turns = list(sample.turns) or [(asked, answer or choose(rng, sample.references))]
        return Row(sample.images, conversation_prompt(template, turns, num_images=len(sample.images)), name=name)

    def rows(step: int) -> list[Row]:
        rng = np.random.default_rng([seed, 11, step])
        return [row(*entries[index], rng) for index in mixture.batch(step, batch_size)]

    return rows


def coupled_rows(corpus: Corpus, weights: dict[str, float], template: str, *, seed: int, batch_size: int,
                 mask_patches: float) -> Rows:
    """Coupled Sample Training: single image-caption samples, two unlike ones of a source made into one pseudo pair.

    Raises ValueError if a source has fewer than two images with a caption of their own.
    """
    names_of = captioned(corpus, weights)

    def row(rng: Generator, source: str) -> Row:
        names, captions = names_of[source], corpus.captions[source]
        first, *others = (names[int(i)] for i in rng.integers(len(names), size=1 + CANDIDATES))
        words = _words(captions[first])
        second = min(others, key=lambda name: len(_words(captions[name]) & words))
        return Row((first, second), coupled_prompt(template, captions[first], captions[second]),
                   bool(rng.random() < mask_patches), f"{source}/{first}+{second}")

    return _by_turns(row, weights, seed=[seed, 13], batch_size=batch_size)


def single_rows(corpus: Corpus, weights: dict[str, float], template: str, *, seed: int, batch_size: int) -> Rows:
    """Each image alone with its caption, as LLaVA's first phase: what Coupled Sample Training is measured against."""
    names_of = captioned(corpus, weights)

    def row(rng: Generator, source: str) -> Row:
        name = choose(rng, names_of[source])
        return Row((name,), single_prompt(template, SINGLE_INSTRUCTION, corpus.captions[source][name]),
                   name=f"{source}/{name}")

    return _by_turns(row, weights, seed=[seed, 17], batch_size=batch_size)


def captioned(corpus: Corpus, weights: dict[str, float]) -> dict[str, list[str]]:
    """The images of each source that have a caption of their own."""
    for source in weights:
        if len(corpus.captions.get(source, ())) < 2:
            raise ValueError(f"params.yaml: align.mixture: source '{source}' has no captions of single images "
                             "to couple; choose a source that has them")
    return {source: sorted(corpus.captions[source]) for source in weights}


def _by_turns(row: Callable[[Generator, str], Row], weights: dict[str, float], *, seed: list[int],
              batch_size: int) -> Rows:
    turns = source_turns(weights)

    def rows(step: int) -> list[Row]:
        rng = np.random.default_rng([*seed, step])
        return [row(rng, turns[slot % len(turns)]) for slot in range(step * batch_size, (step + 1) * batch_size)]

    return rows


def _words(caption: str) -> frozenset[str]:
    return frozenset(caption.replace(",", "").split())


def choose(rng: Generator, options: list[str]) -> str:
    return options[int(rng.integers(len(options)))]


# --- rows to tensors --------------------------------------------------------------------------------------------------


def shared_out(rows: list[Row], parts: int, *, tokens_per_image: int) -> list[list[Row]]:
    """The rows in `parts` of the same number and about the same number of tokens: no rank waits long for another.

    Longest first, dealt out to and fro. Which part a row is in changes no result: the loss is a sum over all of them.
    """
    def length(row: Row) -> int:
        words = sum(len(text) for turn in row.prompt.later for text in turn)
        return len(row.images) * tokens_per_image + (len(row.prompt.question + (row.prompt.answer or "")) + words) // 4

    if parts == 1:
        return [rows]
    ordered = sorted(rows, key=length, reverse=True)
    return [[ordered[turn * parts + (part if turn % 2 == 0 else parts - 1 - part)]
             for turn in range(len(rows) // parts)] for part in range(parts)]


def collate(rows: list[Row], processor: OneDiffProcessor, pixels_of: Pixels) -> Batch:
    """Rows -> what the model's `forward` takes."""
    batch = processor.answers([row.prompt for row in rows])
    batch |= pixels_of([name for row in rows for name in row.images])
    if any(row.masked for row in rows):
        batch["patch_mask"] = torch.tensor([row.masked for row in rows])
    return batch


def decode(corpus: Corpus, processor: OneDiffProcessor) -> Pixels:
    """Images as pixels, for a tower that learns, or that sees too many to keep its features."""
    return lambda names: {"images": processor.pixels([open_image(corpus.files[name]) for name in names])}


class Steps(Dataset[list[Batch]]):
    def __init__(self, make: Callable[[int], list[Batch]], first: int, last: int) -> None:
        self.make, self.first, self.last = make, first, last

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, index: int) -> list[Batch]:
        return self.make(self.first + index)


def stream(make: Callable[[int], list[Batch]], first: int, last: int, *, workers: int, pin: bool) -> Iterator[
        list[Batch]]:
    """make(step) for each step in order; with workers, ahead of time and beside the training."""
    loader = DataLoader(Steps(make, first, last), batch_size=None, num_workers=workers, pin_memory=pin,
                        prefetch_factor=2 if workers else None, multiprocessing_context="fork" if workers else None,
                        worker_init_fn=_ignore_signals)
    return iter(loader)


def _ignore_signals(worker: int) -> None:
    """Loader workers ignore signals, so that the rank still gets batches until it has written its checkpoint. They end
    when the rank ends.
    """
    interrupts.ignore()
