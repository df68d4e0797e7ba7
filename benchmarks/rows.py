"""The training data of the benchmarks: generated pairs with their natural captions, and conversations without images.

There are three kinds of work. `align` draws only pairs of `scenes`. `pairs` draws three pairs of `scenes` for each pair
of `edits`, like presets/tiny.yaml. `mixed` draws one conversation for each pair in addition. The conversations replace
those of LLaVA-665K and are generated from a seed: each has 30 to 600 tokens (log-uniform), one to four turns, and
random words of the captions; one word in five belongs to a question.
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

NUM_SCENES, NUM_EDITS, NUM_CONVERSATIONS = 60, 60, 800  # Each scene gives three pairs.
# A conversation has SHORTEST to LONGEST tokens; the prompt template adds about FRAME tokens to each turn.
SHORTEST, LONGEST, FRAME, MOST_TURNS = 30, 600, 8, 4
MIXTURES = {"align": {"scenes": 1.0}, "pairs": {"scenes": 3.0, "edits": 1.0},
            "mixed": {"scenes": 3.0, "edits": 1.0, "chat": 4.0}}
MEGABATCH = 50  # The number of batches that LengthGroupedSampler of transformers sorts together.
SEED = 7
FOREVER = 10**6


class Bench:
    """The training phase, the batches and the corpus of one case of a benchmark.

    All contenders with one kind of work get equal batches. Required keys of `case`: preset, work, batch (rows per
    step), units (number of different batches), device. Optional keys: model (see `models.settings`), cached, masked,
    lora, steps, workers, processes, zero.
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
        # The batches are grouped by the lengths of LLaVA's prompts, so that the grouping is the best one for LLaVA.
        processor = models.processor_of(models.settings_without_delta(self.config))
        self.batches = grouped(self._drawn_rows(corpus), processor, batch_size=case["batch"], num=case["units"])
        shown = {name for batch in self.batches for row in batch for name in row.images}
        # Training computes the features of all images of the corpus, so the corpus keeps only images of these batches.
        self.corpus = replace(corpus, source_of={name: source for name, source in corpus.source_of.items()
                                                 if name in shown})

    def _drawn_rows(self, corpus: Corpus) -> RowSampler:
        """Return a sampler that draws training rows like the training phase.

        Patches are masked only if the case has the key `masked`, because LLaVA masks no patches.
        """
        sampling = Sampling(self.phase.mixture, self.config.model.template, SEED, self.phase.batch_size,
                            self.phase.mask_patches if self.case.get("masked") else 0.0)
        if self.name == "align":
            return coupled_rows(corpus, sampling)
        return tune_rows(tune_entries(corpus, sampling), sampling)

    def training_run(self, model: OneDiffForConditionalGeneration, processor: OneDiffProcessor,
                     folder: Path) -> TrainingRun:
        """Return a training run that trains the model on the batches of this case and writes into `folder`."""
        return TrainingRun(self.name, self.phase, runtime_of(self.case), folder, model, processor, self.corpus,
                           shuffled(self.batches))

    def train(self, model: OneDiffForConditionalGeneration, processor: OneDiffProcessor, folder: Path,
              log: Log) -> None:
        """Train the model on the batches of this case, with the code of the training stage."""
        phases.train(self.training_run(model, processor, folder), log)

    def facts(self, processor: OneDiffProcessor, config: Config, *, cached: bool = False) -> dict[str, Any]:
        """Return a dict with the rows, tokens and useful FLOPs of one round, the peak FLOP/s and the used memory.

        The key `peak_flops` is None on a CPU and for an unknown GPU. With `cached`, the features of a frozen vision
        encoder come from the feature cache, so they cost no FLOPs.
        """
        text = [processor.answers([row.prompt for row in batch]) for batch in self.batches]
        counts = dict(zip(COUNTED, counts_of(text), strict=True))
        with torch.device("meta"):
            model = OneDiffForConditionalGeneration(models.configuration_of(config, processor))
        peak = peak_tflops(torch.cuda.get_device_name()) if self.case["device"] == "cuda" else None
        flops = Flops.of(model, self.phase, cached_tower=cached and not self.phase.lr_vision)(counts)
        return {"rows": counts["rows"], "tokens": counts["tokens"], "flops": flops, "loaded_gib": memory_gib(),
                "peak_flops": peak and peak * 1e12}


def runtime_of(case: dict[str, Any]) -> Runtime:
    """Return the runtime settings of a case: device, processes, ZeRO level, loader workers and feature cache."""
    number = case.get("processes", 1)
    return Runtime(device=case["device"], checkpoint_every_s=1e9, scratch=str(HOME / "scratch"),
                   feature_cache_gb=20.0 if case.get("cached") else 0.0, gpus=number, zero_level=case.get("zero", 0),
                   loader_workers=case.get("workers", None if case["device"] == "cuda" else 0),
                   launcher="local" if number == 1 else "deepspeed")


def shards_of(config: Config) -> Path:
    """Return a folder of DiffCap shards whose images have the configured size; the first call generates the shards."""
    px = config.model.vision.image_px
    folder = HOME / f"pairs-{px}"
    with waiting_lock(HOME / f"pairs-{px}.lock"):
        if not folder.exists():
            sized = config.model_copy(update={"data": config.data.model_copy(update={"image_px": px})})
            with new_folder(folder) as part:
                write_shards(_records(sized), part, "train", shard_pairs=1000)
    return folder


def _records(config: Config) -> Iterator[Record]:
    """Yield the records of generated scenes, of generated edits and of conversations."""
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
    """Return a random conversation: a list of (question, answer) for each turn, made of random words from `words`."""
    total = np.exp(rng.uniform(np.log(SHORTEST), np.log(LONGEST)))
    num_turns = int(rng.integers(1, min(MOST_TURNS, int(total // SHORTEST)) + 1))
    num_words = max(2 * num_turns, int(total) - FRAME * num_turns)
    turns = rng.choice(words, size=num_words)[: num_words // num_turns * num_turns].reshape(num_turns, -1)
    num_asked = max(1, turns.shape[1] // 5)
    return [(" ".join(turn[:num_asked]), " ".join(turn[num_asked:])) for turn in turns.tolist()]


def grouped(rows: RowSampler, processor: OneDiffProcessor, *, batch_size: int, num: int) -> list[list[BatchRow]]:
    """Draw rows and return `num` batches of them, in random order, each with rows of similar length.

    LengthGroupedSampler of transformers sorts the rows of MEGABATCH steps by length and divides them into batches. This
    function takes evenly spaced batches of those, so that a few batches represent all lengths.
    """
    population = [row for step in range(MEGABATCH) for row in rows(step)]
    lengths = [len(processor.encode_turns(row.prompt)[0]) for row in population]
    order = get_length_grouped_indices(lengths, batch_size, mega_batch_mult=MEGABATCH,
                                       generator=torch.Generator().manual_seed(SEED))
    # The indices are sorted by length again, because LengthGroupedSampler moves the longest row to the front.
    order = sorted(order, key=lambda index: lengths[index])
    starts = [(2 * number + 1) * MEGABATCH // (2 * num) * batch_size for number in range(num)]
    batches = [[population[index] for index in order[start : start + batch_size]] for start in starts]
    return [batches[index] for index in np.random.default_rng(SEED).permutation(num)]


def shuffled(batches: list[list[BatchRow]]) -> RowSampler:
    """Return a function from the number of a step to its rows, which draws all rows in a new random order each epoch.

    OneDiff trains on these shuffled rows, because the loader of the project does not group rows by length.
    """
    flat, size = [row for batch in batches for row in batch], len(batches[0])

    def rows(step: int) -> list[BatchRow]:
        epoch, position = divmod(step, len(batches))
        order = np.random.default_rng([SEED, epoch]).permutation(len(flat))
        return [flat[index] for index in order[position * size : (position + 1) * size]]

    return rows
