"""Choose the rows of each training step.

The mixture decides how often each source is drawn; a source is drawn in shuffled order without replacement. The rows
are a pure function of (seed, step), so a resumed run sees the batches that an uninterrupted run would see, whatever the
number of processes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from onediff.config import Align, Config, Phase, Task, Tune
from onediff.data.batches.corpus import Corpus, Sample
from onediff.data.batches.targets import Facts
from onediff.data.record import digest
from onediff.inputs.prompt import (
    DEFAULT_INSTRUCTION,
    Prompt,
    conversation_prompt,
    coupled_prompt,
    pair_prompt,
    single_prompt,
)

CANDIDATES = 4  # number of random images; Coupled Sample Training pairs an image with the least similar of these
GROUP = 4  # number of rows whose images are paired among each other if every image occurs once
SINGLE_INSTRUCTION = "Describe the image."
AS_RECORDED = Task(instruction=None, targets="drawn", max_new_tokens=None, num_beams=None)
CYCLE = 1000  # number of rows in a cycle, in which each source gets its share of the rows; all cycles are equal


@dataclass(frozen=True)
class BatchRow:
    """One row of a batch, before its images are decoded and its prompt is tokenized.

    `images` holds the digests of the images in order. `name` identifies the row in error messages. If `masked` is true,
    the language model reads the delta tokens of this row but not the patch tokens. `facts` holds what is known about
    the change of a pair (targets.py), and is empty for rows whose images were not recorded as a pair.
    """

    images: tuple[str, ...]
    prompt: Prompt
    masked: bool = False
    name: str = ""
    facts: Facts = field(default_factory=dict)


RowSampler = Callable[[int], list[BatchRow]]
Entry = tuple[Sample, str | None]  # (sample, answer to train on); the answer None means a random reference


@dataclass(frozen=True)
class Sampling:
    """The settings that decide which rows of the corpus each training step draws.

    `weights` is the mixture (source -> sampling weight), `template` the name of the language model's prompt template,
    `mask_patches` the fraction of pairs whose patch tokens are hidden from the language model, and `default_question`
    the fraction of pairs that are trained with the default question instead of the question of their source or record.
    Without `replacement`, the rows of phase `align` contain every image once before any image occurs again.
    """

    weights: dict[str, float]
    template: str
    seed: int
    batch_size: int
    mask_patches: float = 0.0
    tasks: dict[str, Task] = field(default_factory=dict)
    default_question: float = 0.0
    replacement: bool = True

    @classmethod
    def of(cls, config: Config, phase: Phase) -> Sampling:
        """Collect the sampling settings of one training phase from params.yaml."""
        return cls(phase.mixture, config.model.template, config.seed, phase.batch_size, phase.mask_patches,
                   config.tasks, phase.default_question if isinstance(phase, Tune) else 0.0,
                   not isinstance(phase, Align) or phase.replacement)


def tune_entries(corpus: Corpus, sampling: Sampling) -> list[Entry]:
    """Return the (sample, answer) entries of one epoch of instruction tuning; None means a random reference."""
    entries: list[Entry] = []
    for sample in corpus.samples:
        targets = "drawn" if sample.turns else sampling.tasks.get(sample.source, AS_RECORDED).targets
        if sample.source in sampling.weights:
            answers: dict[str, list[str | None]] = {
                "each": [*sample.references], "joined": [" ".join(sample.references)], "drawn": [None]}
            entries += [(sample, answer) for answer in answers[targets]]
    return entries


def tune_rows(entries: list[Entry], sampling: Sampling) -> RowSampler:
    """Return a function (step number -> list of rows) that draws the rows of multi-task instruction tuning.

    The function draws the sources by weight, and visits each entry of a source once before any entry is visited again.
    A share of the pairs, `default_question` of the sampling settings, gets the default question, whatever the source:
    the model then cannot conclude from the question which source a pair comes from. A conversation keeps all its turns
    in order.
    """
    by_source: dict[str, list[int]] = {name: [] for name in sorted(sampling.weights)}
    for index, (sample, _) in enumerate(entries):
        by_source[sample.source].append(index)
    mixture = Mixture(by_source, sampling.weights, sampling.seed)

    def row(sample: Sample, answer: str | None, rng: Generator) -> BatchRow:
        instruction = sampling.tasks.get(sample.source, AS_RECORDED).instruction or sample.instruction
        name = f"{sample.source}/{sample.pair_id}"
        if len(sample.images) == 2 and not sample.turns:
            if rng.random() < sampling.default_question:
                instruction = DEFAULT_INSTRUCTION
            prompt = pair_prompt(sampling.template, instruction, answer or choose(rng, sample.references))
            return BatchRow(sample.images, prompt, bool(rng.random() < sampling.mask_patches), name, sample.facts)
        turns = list(sample.turns) or [(instruction, answer or choose(rng, sample.references))]
        prompt = conversation_prompt(sampling.template, turns, num_images=len(sample.images))
        return BatchRow(sample.images, prompt, name=name, facts=sample.facts)

    def rows(step: int) -> list[BatchRow]:
        rng = np.random.default_rng([sampling.seed, 11, step])
        return [row(*entries[index], rng) for index in mixture.batch(step, sampling.batch_size)]

    return rows


def coupled_rows(corpus: Corpus, sampling: Sampling) -> RowSampler:
    """Return a function (step number -> list of rows) that draws the rows of Coupled Sample Training.

    Each row joins two images of one source with dissimilar captions into a pseudo pair; the answer is both captions in
    order. Raises ValueError if a source has fewer than two captioned single images.
    """
    def row(rng: Generator, source: str, names: list[str], number: int) -> BatchRow:
        captions = corpus.captions[source]
        if sampling.replacement:
            first, *others = (names[int(i)] for i in rng.integers(len(names), size=1 + CANDIDATES))
            second = _least_similar(captions, first, others)
        else:
            first, second = _next_pair(captions, names, sampling.seed, source, number)
        return BatchRow((first, second), coupled_prompt(sampling.template, captions[first], captions[second]),
                        bool(rng.random() < sampling.mask_patches), f"{source}/{first}+{second}")

    return _by_turns(corpus, sampling, row, stream=13)


def single_rows(corpus: Corpus, sampling: Sampling) -> RowSampler:
    """Return a function (step number -> list of rows) that draws rows with one captioned image each.

    LLaVA's first phase trains on such rows; they are a baseline for Coupled Sample Training. Raises ValueError if a
    source has fewer than two captioned single images.
    """
    def row(rng: Generator, source: str, names: list[str], number: int) -> BatchRow:
        epoch, position = divmod(number, len(names))
        name = (choose(rng, names) if sampling.replacement else
                names[_order(sampling.seed, source, epoch, len(names))[position]])
        return BatchRow((name,), single_prompt(sampling.template, SINGLE_INSTRUCTION, corpus.captions[source][name]),
                        name=f"{source}/{name}")

    return _by_turns(corpus, sampling, row, stream=17)


def _by_turns(corpus: Corpus, sampling: Sampling, row: Callable[[Generator, str, list[str], int], BatchRow], *,
              stream: int) -> RowSampler:
    """Return a function (step number -> list of rows) that, for each row, draws a source by weight and calls `row`.

    The call is `row(rng, source, names, number)`, where `names` are the digests of the source's captioned images, and
    `number` counts the earlier rows of this source. `stream` is a part of the random seed, so that two kinds of rows
    get different random numbers.
    """
    for source in sampling.weights:
        if len(corpus.captions.get(source, ())) < 2:
            raise ValueError(f"params.yaml: align.mixture: source '{source}' has fewer than two captioned single "
                             "images, which this phase trains on; choose another source")
    names_of = {source: sorted(corpus.captions[source]) for source in sampling.weights}
    turns, size = Turns(sampling.weights), sampling.batch_size

    def rows(step: int) -> list[BatchRow]:
        rng = np.random.default_rng([sampling.seed, stream, step])
        drawn = [turns.draw(slot) for slot in range(step * size, (step + 1) * size)]
        return [row(rng, source, names_of[source], number) for source, number in drawn]

    return rows


def _next_pair(captions: dict[str, str], names: list[str], seed: int, source: str, number: int) -> tuple[str, str]:
    """Return the two images of row `number` of a source, so that each image occurs once in an epoch.

    The images of GROUP rows are paired among each other, each with the least similar one that is left. If the number of
    images is odd, each epoch omits one image.
    """
    epoch, row = divmod(number, len(names) // 2)
    order = _order(seed, source, epoch, len(names))[: len(names) // 2 * 2]
    group, place = divmod(row, GROUP)
    left = [names[index] for index in order[2 * GROUP * group :][: 2 * GROUP]]
    for _ in range(place + 1):
        first = left.pop(0)
        second = left.pop(left.index(_least_similar(captions, first, left)))
    return first, second


def _least_similar(captions: dict[str, str], first: str, others: list[str]) -> str:
    """Return the image of `others` whose caption shares the fewest words with the caption of `first`."""
    words = _words(captions[first])
    return min(others, key=lambda name: len(_words(captions[name]) & words))


def _words(caption: str) -> frozenset[str]:
    return frozenset(caption.replace(",", "").split())


def choose(rng: Generator, options: list[str]) -> str:
    """Return one random element of `options`; all elements have equal probability."""
    return options[int(rng.integers(len(options)))]


class Mixture:
    """Draws sample indices from several sources by weight; they depend only on seed, step and batch size.

    Because no state is kept between steps, a resumed run draws the indices that an uninterrupted run would draw.
    """

    def __init__(self, indices_by_source: dict[str, list[int]], weights: dict[str, float], seed: int) -> None:
        """Prepare the mixture from the sample indices and the sampling weight of each source.

        Raises ValueError if there is no source, a weight is not positive, or a source has no samples.
        """
        if not weights:
            raise ValueError("mixture: no source is given; set at least one source with a weight above 0")
        for name, weight in weights.items():
            if not weight > 0:
                raise ValueError(f"mixture.{name}: weight must be above 0, got {weight}; to train without this source, "
                                 "remove it from the mixture")
            if not indices_by_source.get(name):
                raise ValueError(f"mixture.{name}: this source has no pairs; choose from the sources with pairs: "
                                 f"{sorted(indices_by_source)}")
        self.seed, self.indices, self.turns = seed, indices_by_source, Turns(weights)

    def batch(self, step: int, size: int) -> list[int]:
        """Return the indices of the `size` samples that step number `step` trains on."""
        return [self._draw(slot) for slot in range(step * size, (step + 1) * size)]

    def _draw(self, slot: int) -> int:
        source, num_drawn = self.turns.draw(slot)
        indices = self.indices[source]
        epoch, position = divmod(num_drawn, len(indices))
        return indices[_order(self.seed, source, epoch, len(indices))[position]]


class Turns:
    """Gives each row of training to a source, so that each source gets the share that its weight sets.

    The rows follow a cycle of CYCLE rows. Each row goes to the source that is furthest below its share so far.
    """

    def __init__(self, weights: dict[str, float]) -> None:
        parts = np.array(list(weights.values()), dtype=np.float64)
        share, given = parts / parts.sum(), np.zeros(len(parts))
        self.sources: list[str] = []  # position in a cycle -> source
        self.num_earlier: list[int] = []  # position in a cycle -> number of earlier positions with the same source
        for turn in range(CYCLE):
            number = int(np.argmax(share * (turn + 1) - given))
            self.sources.append(list(weights)[number])
            self.num_earlier.append(int(given[number]))
            given[number] += 1
        self.num_turns = Counter(self.sources)  # source -> number of rows of this source in a cycle

    def draw(self, slot: int) -> tuple[str, int]:
        """Return the source of the row number `slot`, and the number of earlier rows of this source."""
        cycle, position = divmod(slot, CYCLE)
        source = self.sources[position]
        return source, cycle * self.num_turns[source] + self.num_earlier[position]


@lru_cache(maxsize=64)
def _order(seed: int, name: str, epoch: int, length: int) -> NDArray[np.int64]:
    """Return the shuffled order in which one epoch visits the samples of source `name`, as an array of positions.

    The result is cached, because every draw of the epoch needs it.
    """
    return np.random.default_rng([seed, int(digest(name.encode())[:8], 16), epoch]).permutation(length)
