"""What the contenders train on: rendered scenes and edits with their natural captions, and conversations of text.

Pairs: three of scenes to one of edits, as presets/tiny.yaml mixes them. Mixed: as many conversations as pairs; these
stand for LLaVA-665K's and are made up from a seed: words of the captions, 30 to 600 tokens in all, uniform in their
logarithm, in one to four turns, one word in five the asker's.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from transformers.trainer_pt_utils import get_length_grouped_indices

from benchmarks import models
from benchmarks.models import HOME
from onediff.config import Config, Lora, Phase, Runtime
from onediff.data.batches.corpus import Corpus
from onediff.data.batches.sampling import BatchRow, RowSampler, Sampling, coupled_rows, tune_entries, tune_rows
from onediff.data.record import Record, write_shards
from onediff.data.synthesis.edits.records import edit_record
from onediff.data.synthesis.scenes.records import scene_records
from onediff.files import new_folder, waiting_lock
from onediff.inputs.processing import OneDiffProcessor
from onediff.inputs.prompt import DEFAULT_INSTRUCTION
from onediff.model.onediff import OneDiffForConditionalGeneration
from onediff.train import phases
from onediff.train.cost import Flops, peak_tflops
from onediff.train.loop import Log, TrainingRun
from onediff.train.speed import COUNTED, counts_of, memory_gib

NUM_SCENES, NUM_EDITS, NUM_CONVERSATIONS = 60, 60, 800  # a scene gives three pairs
SHORTEST, LONGEST, FRAME, MOST_TURNS = 30, 600, 8, 4  # tokens; FRAME: of each turn's own marks, about
MIXTURES = {"align": {"scenes": 1.0}, "pairs": {"scenes": 3.0, "edits": 1.0},
            "mixed": {"scenes": 3.0, "edits": 1.0, "chat": 4.0}}
MEGABATCH = 50  # batches that transformers' LengthGroupedSampler sorts at once
SEED = 7
FOREVER = 10**6


class Bench:
    """A case: phase, batches and corpus, which are the same for all contenders of a work.

    Keys of the case: preset, work, batch (rows of a step), units (different batches), device; where they are not the
    default: model (see `models.settings`), cached, masked, lora, steps, workers, processes, zero.
    """

    def __init__(self, case: dict[str, Any]) -> None:
        self.case, self.name = case, "align" if case["work"] == "align" else "tune"
        self.config = models.settings(case["preset"], **case.get("model", {}))
        phase, mixture = getattr(self.config, self.name), MIXTURES[case["work"]]
        lora = Lora(rank=64, alpha=128) if case.get("lora") and phase.lr_language else None
        self.phase: Phase = phase.model_copy(update={
            "mixture": mixture, "steps": case.get("steps", FOREVER), "epochs": None, "batch_size": case["batch"],
            "validate_every": None, "lora": lora, "warmup": 0.0})
        folder = shards_of(self.config)
        corpus = Corpus.read(folder, "train", mixture,
                             store=folder.parent / f"corpus-{folder.name}-{'-'.join(sorted(mixture))}")
        processor = models.processor_of(models.settings_without_delta(self.config))  # lengths as the peer has them
        self.batches = grouped(self._drawn_rows(corpus), processor, batch_size=case["batch"], num=case["units"])
        shown = {name for batch in self.batches for row in batch for name in row.images}
        # Features of other images would be computed for nothing.
        self.corpus = replace(corpus, source_of={name: source for name, source in corpus.source_of.items()
                                                 if name in shown})

    def _drawn_rows(self, corpus: Corpus) -> RowSampler:
        """As the phase draws them. The patches of a row are masked only if the case says so, because LLaVA masks none.
        """
        sampling = Sampling(self.phase.mixture, self.config.model.template, SEED, self.phase.batch_size,
                            self.phase.mask_patches if self.case.get("masked") else 0.0)
        if self.name == "align":
            return coupled_rows(corpus, sampling)
        return tune_rows(tune_entries(corpus, sampling), sampling)

    def training_run(self, model: OneDiffForConditionalGeneration, processor: OneDiffProcessor,
                     folder: Path) -> TrainingRun:
        return TrainingRun(self.name, self.phase, runtime_of(self.case), folder, model, processor, self.corpus,
                           shuffled(self.batches), num_samples=1)

    def train(self, model: OneDiffForConditionalGeneration, processor: OneDiffProcessor, folder: Path,
              log: Log) -> None:
        """The phase as a stage runs it."""
        phases.train(self.training_run(model, processor, folder), log)

    def facts(self, processor: OneDiffProcessor, config: Config, *, cached: bool = False) -> dict[str, Any]:
        """Of a round: rows, tokens and useful FLOPs; what the hardware could do in a second; memory so far."""
        text = [processor.answers([row.prompt for row in batch]) for batch in self.batches]
        counts = dict(zip(COUNTED, counts_of(text), strict=True))
        with torch.device("meta"):
            model = OneDiffForConditionalGeneration(models.configuration_of(config, processor))
        peak = peak_tflops(torch.cuda.get_device_name()) if self.case["device"] == "cuda" else None
        flops = Flops.of(model, self.phase, cached_tower=cached and not self.phase.lr_vision)(counts)
        return {"rows": counts["rows"], "tokens": counts["tokens"], "flops": flops, "loaded_gib": memory_gib(),
                "peak_flops": peak and peak * 1e12}


def runtime_of(case: dict[str, Any]) -> Runtime:
    number = case.get("processes", 1)
    return Runtime(device=case["device"], checkpoint_every_s=1e9, scratch=str(HOME / "scratch"),
                   feature_cache_gb=20.0 if case.get("cached") else 0.0, gpus=number, zero_level=case.get("zero", 0),
                   loader_workers=case.get("workers", None if case["device"] == "cuda" else 0),
                   launcher="local" if number == 1 else "deepspeed")


def shards_of(config: Config) -> Path:
    """Made once for each size of image."""
    px = config.model.vision.image_px
    folder = HOME / f"pairs-{px}"
    with waiting_lock(HOME / f"pairs-{px}.lock"):
        if not folder.exists():
            sized = config.model_copy(update={"data": config.data.model_copy(update={"image_px": px})})
            with new_folder(folder) as part:
                write_shards(_records(sized), part, "train", shard_pairs=1000)
    return folder


def _records(config: Config) -> Iterator[Record]:
    words: list[str] = []
    for index in range(NUM_SCENES):
        for record in scene_records(config, "train", index):
            words += " ".join(record.references).split()
            yield record
    yield from (edit_record(config, "train", index) for index in range(NUM_EDITS))
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
    num_words = max(2 * num_turns, int(total) - FRAME * num_turns)
    turns = rng.choice(words, size=num_words)[: num_words // num_turns * num_turns].reshape(num_turns, -1)
    num_asked = max(1, turns.shape[1] // 5)
    return [(" ".join(turn[:num_asked]), " ".join(turn[num_asked:])) for turn in turns.tolist()]


def grouped(rows: RowSampler, processor: OneDiffProcessor, *, batch_size: int, num: int) -> list[list[BatchRow]]:
    """`num` batches of alike lengths in a random order: evenly spaced ones of those that transformers'
    LengthGroupedSampler makes of the rows of MEGABATCH steps, so that a few of them stand for all.
    """
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
