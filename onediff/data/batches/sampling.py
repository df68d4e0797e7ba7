"""Which rows the batch of a step holds: sources by weight, each source in shuffled order without replacement.

Everything is a pure function of (seed, step), so a resumed run sees the batches that an uninterrupted run would see, on
any number of processes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from onediff.config import Config, Phase, Task
from onediff.data.batches.corpus import Corpus, Sample
from onediff.data.record import digest
from onediff.inputs.prompt import Prompt, conversation_prompt, coupled_prompt, pair_prompt, single_prompt

CANDIDATES = 4  # images among which Coupled Sample Training seeks the least alike
SINGLE_INSTRUCTION = "Describe the image."
AS_RECORDED = Task(instruction=None, targets="drawn", max_new_tokens=None, num_beams=None)
CYCLE = 1000  # weights are exact to one part in this number


@dataclass(frozen=True)
class BatchRow:
    """One row of a batch: the digests of its images, in order, its prompt, and the name that an error message gives.

    `masked`: the language model reads the delta tokens of this row, but not its patch tokens.
    """

    images: tuple[str, ...]
    prompt: Prompt
    masked: bool = False
    name: str = ""


RowSampler = Callable[[int], list[BatchRow]]
Entry = tuple[Sample, str | None]  # with its answer; None where a reference is drawn at each visit


@dataclass(frozen=True)
class Sampling:
    """How the rows of a step are drawn. `weights`: of the sources; `template`: of the language model's prompts."""

    weights: dict[str, float]
    template: str
    seed: int
    batch_size: int
    mask_patches: float = 0.0
    tasks: dict[str, Task] = field(default_factory=dict)

    @classmethod
    def of(cls, config: Config, phase: Phase) -> Sampling:
        return cls(phase.mixture, config.model.template, config.seed, phase.batch_size, phase.mask_patches,
                   config.tasks)


def tune_entries(corpus: Corpus, sampling: Sampling) -> list[Entry]:
    """What an epoch visits once."""
    entries: list[Entry] = []
    for sample in corpus.samples:
        targets = "drawn" if sample.turns else sampling.tasks.get(sample.source, AS_RECORDED).targets
        if sample.source in sampling.weights:
            answers: dict[str, list[str | None]] = {
                "each": [*sample.references], "joined": [" ".join(sample.references)], "drawn": [None]}
            entries += [(sample, answer) for answer in answers[targets]]
    return entries


def tune_rows(entries: list[Entry], sampling: Sampling) -> RowSampler:
    """Multi-task instruction tuning: sources by weight, each without replacement per epoch.

    A conversation is read from its first turn to its last.
    """
    by_source: dict[str, list[int]] = {name: [] for name in sorted(sampling.weights)}
    for index, (sample, _) in enumerate(entries):
        by_source[sample.source].append(index)
    mixture = Mixture(by_source, sampling.weights, sampling.seed)

    def row(sample: Sample, answer: str | None, rng: Generator) -> BatchRow:
        instruction = sampling.tasks.get(sample.source, AS_RECORDED).instruction or sample.instruction
        name = f"{sample.source}/{sample.pair_id}"
        if len(sample.images) == 2:
            prompt = pair_prompt(sampling.template, instruction, answer or choose(rng, sample.references))
            return BatchRow(sample.images, prompt, bool(rng.random() < sampling.mask_patches), name)
        turns = list(sample.turns) or [(instruction, answer or choose(rng, sample.references))]
        prompt = conversation_prompt(sampling.template, turns, num_images=len(sample.images))
        return BatchRow(sample.images, prompt, name=name)

    def rows(step: int) -> list[BatchRow]:
        rng = np.random.default_rng([sampling.seed, 11, step])
        return [row(*entries[index], rng) for index in mixture.batch(step, sampling.batch_size)]

    return rows


def coupled_rows(corpus: Corpus, sampling: Sampling) -> RowSampler:
    """Coupled Sample Training: single image-caption samples, two unlike ones of a source made into one pseudo pair.

    Raises ValueError if a source has fewer than two images with a caption of their own.
    """
    def row(rng: Generator, source: str, names: list[str]) -> BatchRow:
        captions = corpus.captions[source]
        first, *others = (names[int(i)] for i in rng.integers(len(names), size=1 + CANDIDATES))
        words = _words(captions[first])
        second = min(others, key=lambda name: len(_words(captions[name]) & words))
        return BatchRow((first, second), coupled_prompt(sampling.template, captions[first], captions[second]),
                        bool(rng.random() < sampling.mask_patches), f"{source}/{first}+{second}")

    return _by_turns(corpus, sampling, row, stream=13)


def single_rows(corpus: Corpus, sampling: Sampling) -> RowSampler:
    """Each image with its caption, as in LLaVA's first phase: the baseline of Coupled Sample Training."""
    def row(rng: Generator, source: str, names: list[str]) -> BatchRow:
        name = choose(rng, names)
        return BatchRow((name,), single_prompt(sampling.template, SINGLE_INSTRUCTION, corpus.captions[source][name]),
                        name=f"{source}/{name}")

    return _by_turns(corpus, sampling, row, stream=17)


def _by_turns(corpus: Corpus, sampling: Sampling, row: Callable[[Generator, str, list[str]], BatchRow], *,
              stream: int) -> RowSampler:
    """Rows of the sources in turn. row(rng, source, names) draws one of the images that have a caption of their own;
    `stream` separates the random numbers from those of other samplers.
    """
    for source in sampling.weights:
        if len(corpus.captions.get(source, ())) < 2:
            raise ValueError(f"params.yaml: align.mixture: source '{source}' has no captions of single images "
                             "to couple; choose a source that has them")
    names_of = {source: sorted(corpus.captions[source]) for source in sampling.weights}
    turns, size = source_turns(sampling.weights), sampling.batch_size

    def rows(step: int) -> list[BatchRow]:
        rng = np.random.default_rng([sampling.seed, stream, step])
        sources = [turns[slot % len(turns)] for slot in range(step * size, (step + 1) * size)]
        return [row(rng, source, names_of[source]) for source in sources]

    return rows


def _words(caption: str) -> frozenset[str]:
    return frozenset(caption.replace(",", "").split())


def choose(rng: Generator, options: list[str]) -> str:
    return options[int(rng.integers(len(options)))]


class Mixture:
    """A pure function from (seed, step, size) to indices: a resumed run draws what an uninterrupted one would."""

    def __init__(self, indices_by_source: dict[str, list[int]], weights: dict[str, float], seed: int) -> None:
        """Raises ValueError for a weight that is not positive and for a source without pairs."""
        if not weights:
            raise ValueError("mixture: no source; name at least one with its weight")
        for name, weight in weights.items():
            if not weight > 0:
                raise ValueError(f"mixture.{name}: weight must be above 0, got {weight}; leave the source out instead")
            if not indices_by_source.get(name):
                raise ValueError(f"mixture.{name}: no pairs of this source; sources with pairs: "
                                 f"{sorted(indices_by_source)}")
        self.seed, self.indices, self.turns = seed, indices_by_source, source_turns(weights)
        self.num_turns: Counter[str] = Counter()  # of each source in a cycle
        self.num_earlier: list[int] = []  # turns that the slot's source had earlier in the cycle
        for source in self.turns:
            self.num_earlier.append(self.num_turns[source])
            self.num_turns[source] += 1

    def batch(self, step: int, size: int) -> list[int]:
        return [self._draw(slot) for slot in range(step * size, (step + 1) * size)]

    def _draw(self, slot: int) -> int:
        cycle, offset = divmod(slot, CYCLE)
        source = self.turns[offset]
        indices, position = self.indices[source], cycle * self.num_turns[source] + self.num_earlier[offset]
        epoch, place = divmod(position, len(indices))
        return indices[_order(self.seed, source, epoch, len(indices))[place]]


def source_turns(weights: dict[str, float]) -> list[str]:
    """Whose turn it is in each of CYCLE slots: each turn goes to the source that is furthest behind its share."""
    parts = np.array(list(weights.values()), dtype=np.float64)
    share, num_turns, turns = parts / parts.sum(), np.zeros(len(parts)), []
    for turn in range(CYCLE):
        source = int(np.argmax(share * (turn + 1) - num_turns))
        num_turns[source] += 1
        turns.append(list(weights)[source])
    return turns


@lru_cache(maxsize=64)
def _order(seed: int, name: str, epoch: int, length: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, int(digest(name.encode())[:8], 16), epoch]).permutation(length)
