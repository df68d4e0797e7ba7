"""What the contenders train on: rendered scenes and edits with their natural captions, and conversations of text.

Pairs: three of scenes to one of edits, as presets/tiny.yaml mixes them. Mixed: as many conversations as pairs; these
stand for LLaVA-665K's and are made up from a seed: words of the captions, 30 to 600 tokens in all, uniform in their
logarithm, in one to four turns, one word in five the asker's.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.random import Generator

from benchmarks.models import HOME
from onediff.config import Config, Phase
from onediff.data.record import Record, write_shards
from onediff.inputs.prompt import DEFAULT_INSTRUCTION

if TYPE_CHECKING:
    from onediff.data.batches.corpus import Corpus
    from onediff.data.batches.sampling import BatchRow, RowSampler
    from onediff.inputs.processing import OneDiffProcessor

NUM_SCENES, NUM_EDITS, NUM_CONVERSATIONS = 60, 60, 800  # a scene gives three pairs
SHORTEST, LONGEST, FRAME, MOST_TURNS = 30, 600, 8, 4  # tokens; FRAME: of each turn's own marks, about
MIXTURES = {"pairs": {"scenes": 3.0, "edits": 1.0}, "mixed": {"scenes": 3.0, "edits": 1.0, "chat": 4.0}}
MEGABATCH = 50  # batches that transformers' LengthGroupedSampler sorts at once
SEED = 7


def shards_of(config: Config) -> Path:
    """Made once for each size of image."""
    px = config.model.vision.image_px
    folder = HOME / f"pairs-{px}"
    HOME.mkdir(parents=True, exist_ok=True)
    with (HOME / f"pairs-{px}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "card.json").exists():
            sized = config.model_copy(update={"data": config.data.model_copy(update={"image_px": px})})
            write_shards(_records(sized), folder, "train", shard_pairs=1000)
            (folder / "card.json").write_text("{}")
    return folder


def _records(config: Config) -> Iterator[Record]:
    from onediff.data.synthesis.edits.records import edit_record
    from onediff.data.synthesis.scenes.records import scene_records

    words: list[str] = []
    for index in range(NUM_SCENES):
        for record in scene_records(config, "train", index):
            words += " ".join(record.references).split()
            yield record
    for index in range(NUM_EDITS):
        yield edit_record(config, "train", index)
    rng = np.random.default_rng(SEED)
    for index in range(NUM_CONVERSATIONS):
        turns = conversation(rng, words)
        yield Record(pair_id=f"chat-{index}", source="chat", split="train", group_id=f"chat-{index}", before=b"",
                     after=b"", references=[turns[0][1]], instruction=DEFAULT_INSTRUCTION, change_type="unlabelled",
                     provenance={"conversation": turns}, num_images=0)


def conversation(rng: Generator, words: list[str]) -> list[tuple[str, str]]:
    """Questions and answers."""
    total = np.exp(rng.uniform(np.log(SHORTEST), np.log(LONGEST)))
    num_turns = int(rng.integers(1, min(MOST_TURNS, int(total // SHORTEST)) + 1))
    said = iter(rng.choice(words, size=max(2 * num_turns, int(total) - FRAME * num_turns)))
    each = max(2, (int(total) - FRAME * num_turns) // num_turns)
    asked = max(1, each // 5)
    take = lambda count: " ".join(str(next(said)) for _ in range(count))  # noqa: E731
    return [(take(asked), take(each - asked)) for _ in range(num_turns)]


def drawn_rows(corpus: Corpus, config: Config, phase: Phase, *, name: str, masked: bool) -> RowSampler:
    """As the phase itself draws them; `masked` False: no row whose patches may not be read, for LLaVA has none."""
    from onediff.data.batches.sampling import Sampling, coupled_rows, tune_entries, tune_rows

    sampling = Sampling(phase.mixture, config.model.template, SEED, phase.batch_size,
                        phase.mask_patches if masked else 0.0)
    if name == "align":
        return coupled_rows(corpus, sampling)
    return tune_rows(tune_entries(corpus, sampling), sampling)


def grouped(rows: RowSampler, processor: OneDiffProcessor, *, batch_size: int, num: int) -> list[list[BatchRow]]:
    """`num` batches of alike lengths in a random order: evenly spaced ones of those that transformers'
    LengthGroupedSampler makes of the rows of MEGABATCH steps, so that a few of them stand for all.
    """
    import torch
    from transformers.trainer_pt_utils import get_length_grouped_indices

    population = [row for step in range(MEGABATCH) for row in rows(step)]
    lengths = [len(processor.encode_turns(row.prompt)[0]) for row in population]
    order = get_length_grouped_indices(lengths, batch_size, mega_batch_mult=MEGABATCH,
                                       generator=torch.Generator().manual_seed(SEED))
    order = sorted(order, key=lambda index: lengths[index])  # the sampler puts the longest one before all others
    starts = [(2 * number + 1) * MEGABATCH // (2 * num) * batch_size for number in range(num)]
    batches = [[population[index] for index in order[start : start + batch_size]] for start in starts]
    return [batches[index] for index in np.random.default_rng(SEED).permutation(num)]


def shuffled(batches: list[list[BatchRow]]) -> RowSampler:
    """The same rows as our loader gives them: in a new random order each time they were all seen."""
    flat, size = [row for batch in batches for row in batch], len(batches[0])

    def rows(step: int) -> list[BatchRow]:
        epoch, place = divmod(step, len(batches))
        order = np.random.default_rng([SEED, epoch]).permutation(len(flat))
        return [flat[index] for index in order[place * size : (place + 1) * size]]

    return rows


def only_seen(corpus: Corpus, batches: list[list[BatchRow]]) -> Corpus:
    """Without the images that no row shows, whose features would be computed for nothing."""
    seen = {name for batch in batches for row in batch for name in row.images}
    return replace(corpus, source_of={name: source for name, source in corpus.source_of.items() if name in seen})


def store_of(folder: Path, mixture: dict[str, float]) -> Path:
    """Where Corpus.read keeps what it read."""
    return folder.parent / f"corpus-{folder.name}-{'-'.join(sorted(mixture))}"


