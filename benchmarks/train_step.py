"""Compares a training step of OneDiff with a training step of LLaVA of transformers on both images; one table.

    python -m benchmarks.train_step                           # tiny: align, tune on pairs, tune on mixed lengths
    python -m benchmarks.train_step --preset small --rounds 2
    python -m benchmarks.train_step --overhead                # time of the training loop outside DeepSpeed's calls
    python -m benchmarks.train_step --attention               # ways to compute attention on packed rows
    python -m benchmarks.train_step --preset paper --device cuda --work align --work pairs --lora   # never run

OneDiff runs the code of a training phase: corpus, loader, packed rows, and `fit` with gradient clipping and fused
AdamW. The peer is LlavaForConditionalGeneration under Trainer of transformers with its fastest settings: rows grouped
by length, padding on the right, SDPA, fused AdamW, gradient clipping, no logging and no saving. Equal parts are frozen.
All contenders see equal rows, images and texts (benchmarks/rows.py); benchmarks/models.py lists the model sizes.

LLaVA reads every patch of both images. "all patches" (patch_pool 1, token layout A) does so too, and computes the
Visual Delta Module in addition, so it is the fair comparison. "cached" reads the features of the frozen vision encoder
from the cache, which is the default of `fit`. "as preset" also uses the pooling, the token layout and the masked rows
of the preset.

The time of a step is the time since the end of the previous step, so it includes loading. Each contender runs in a
separate process, and they take turns after each step. A round is `--units` steps of each contender; the ratio is
computed for each round, and the table shows its median, lowest and highest value. "peak GiB" is the memory of the
process (on a GPU: GPU memory), and "to learn" is the part of it that training added to the loaded model. GFLOP/s
follows onediff.train.cost: 6, 4 or 2 FLOPs for each weight and token, without padding and recomputation; on a GPU the
table also shows model FLOPs utilization (MFU). On a GPU the contenders run one after the other, and the peer keeps
weights and AdamW state only in bfloat16 (OneDiff also in float32).
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import cycle
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
from rich.table import Table
from torch import Tensor
from torch.nn import functional
from transformers import Trainer, TrainerCallback, TrainingArguments
from typer import Option

from benchmarks import models, script, turns
from benchmarks.rows import FOREVER, MIXTURES, Bench, shuffled
from benchmarks.turns import Contender, Turn
from onediff.data.batches.loader import Batch, Pixels, collate, decode
from onediff.data.batches.sampling import BatchRow
from onediff.inputs.processing import IGNORED, OneDiffProcessor
from onediff.model import packing
from onediff.model.onediff import OneDiffForConditionalGeneration
from onediff.train import loop, lora
from onediff.train.engine import Engine, learning_rates, trainable
from onediff.train.speed import Meter

KINDS: dict[str, dict[str, Any]] = {
    "LLaVA, Trainer": {"peer": True},
    "OneDiff, all patches": {"model": models.ALL_PATCHES, "cached": False},
    "OneDiff, all patches, cached": {"model": models.ALL_PATCHES, "cached": True},
    "OneDiff, as preset": {"model": {}, "cached": True, "masked": True},
}
ATTENTIONS = ("row by row", "padded inside attention", "alike rows inside attention", "padded rows",
              "padded rows, grouped")
BATCH = {"tiny": 32, "small": 8, "paper": 16}
UNITS = {"align": 1, "pairs": 1, "mixed": 2}
ALIKE = 0.8  # the smallest allowed length of a row, as a share of the longest row in the same group


def main(preset: Annotated[str, Option(help=f"One of {', '.join(models.PRESETS)}.")] = "tiny",
         work: Annotated[list[str] | None, Option(help=f"Any of {', '.join(MIXTURES)}; default: all.")] = None,
         rounds: int = 2, units: Annotated[int | None, Option(help="Steps of each contender per round.")] = None,
         batch: Annotated[int | None, Option(help="Rows per step.")] = None, device: str = "cpu",
         lora: bool = False, threads: int = 1, attention: bool = False, overhead: bool = False) -> None:
    """Measure training steps of OneDiff and of LLaVA."""
    for name in work or ():
        if name not in MIXTURES:
            raise ValueError(f"--work {name}: must be one of {', '.join(MIXTURES)}; choose one of them")
    models.settings(preset)
    shared = {"preset": preset, "batch": batch or BATCH[preset], "device": device, "lora": lora, "threads": threads}
    kinds = KINDS
    if attention:
        kinds = {kind: {"attention": kind, "model": models.ALL_PATCHES} for kind in ATTENTIONS}
    elif overhead:
        kinds = {"fit": {"overhead": True, "model": models.ALL_PATCHES}}
    columns = (["seconds a step", "in DeepSpeed's forward, backward, step", "our loop's share"] if overhead else
               ["rows/s", "tokens/s", "GFLOP/s", "MFU", "peak GiB", "to learn", "times the peer"])
    table = Table("work", "contender", *columns, title=f"{preset}, {shared['batch']} rows a step, {device}" + (
        f", {threads} threads" if device == "cpu" else ""))
    for name in work or (("pairs", "mixed") if attention else MIXTURES):
        each = units or UNITS[name]
        contenders = [Contender(kind, "benchmarks.train_step", shared | case | {"work": name, "units": each})
                      for kind, case in kinds.items()]
        turns.race(contenders, rounds=rounds, units=each, threads=threads, together=device == "cpu")
        for contender in contenders:
            table.add_row(name, contender.name, *(_loop_share(contender) if overhead else
                                                  _speed(contender, contenders[0])))
        table.add_section()
    script.show(table)


def _speed(contender: Contender, peer: Contender) -> list[str]:
    """Return the table cells of one contender: the speed, the memory, and the speed divided by that of the peer."""
    facts, seconds = contender.facts, median(contender.rounds)
    flops = facts["flops"] / seconds
    return [f"{facts['rows'] / seconds:.2f}", f"{facts['tokens'] / seconds:.0f}", f"{flops / 1e9:.1f}",
            f"{flops / facts['peak_flops']:.1%}" if facts["peak_flops"] else "",
            f"{facts['memory_gib']:.2f}", f"{facts['memory_gib'] - facts['loaded_gib']:.2f}",
            "1" if contender is peer else turns.with_range(turns.ratios(contender, peer))]


def _loop_share(contender: Contender) -> list[str]:
    """Return the table cells of one contender: seconds of a step, seconds in DeepSpeed, and the remaining share."""
    total, engine = contender.facts["total_s"], contender.facts["engine_s"]
    shares = [1 - engine_s / step_s for engine_s, step_s in zip(engine, total, strict=True)]
    return [f"{sum(total) / len(total):.3f}", f"{sum(engine) / len(engine):.3f}", turns.with_range(shares, ".2%")]


def contender(case: dict[str, Any], turn: Turn) -> None:
    """Run the training steps of one contender. This function runs in the process of the contender."""
    if case["device"] == "cpu":
        torch.set_num_threads(case["threads"])
    bench = Bench(case)
    if case.get("peer"):
        train_llava(bench, turn)
        return
    model, processor = models.onediff(bench.config, case["device"])
    if case.get("overhead"):
        overhead(bench, turn, model, processor)
        return
    turn.facts |= bench.facts(processor, bench.config, cached=bool(case.get("attention") or case["cached"]))
    if case.get("attention"):
        attention(bench, turn, model, processor)
    else:
        with TemporaryDirectory() as folder:
            bench.train(model, processor, Path(folder), turn)


def train_llava(bench: Bench, turn: Turn) -> None:
    """Train LLaVA with Trainer of transformers, and wait for the next turn after each step."""
    class Turns(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            turn()

    model, processor = models.llava(bench.config, bench.case["device"])
    rates = learning_rates(bench.phase)
    if bench.phase.lora:
        lora.add(model, bench.phase.lora)
    for name, parameter in model.named_parameters():
        part = ("vision" if "vision_tower" in name else "projector" if "multi_modal_projector" in name else "language")
        parameter.requires_grad_(rates[part] > 0 and (part != "language" or not bench.phase.lora
                                                      or lora.is_adapter(name)))
    turn.facts |= bench.facts(processor, models.settings_without_delta(bench.config))
    rows = [row for batch in bench.batches for row in batch]
    with TemporaryDirectory() as folder:
        collator = partial(for_llava, processor=processor, pixels_of=decode(bench.corpus, processor))
        Trainer(model=model, args=trainer_arguments(bench, folder), train_dataset=rows, callbacks=[Turns()],
                data_collator=collator).train()


def trainer_arguments(bench: Bench, folder: str) -> TrainingArguments:
    """Return arguments with which Trainer reads the rows in order, because they are already grouped by length."""
    phase, gpu = bench.phase, bench.case["device"] == "cuda"
    return TrainingArguments(
        output_dir=folder, max_steps=FOREVER, per_device_train_batch_size=bench.case["batch"],
        train_sampling_strategy="sequential", optim="adamw_torch_fused",
        learning_rate=max(learning_rates(phase).values()), weight_decay=phase.weight_decay.language,
        max_grad_norm=phase.clip_norm, lr_scheduler_type="cosine", report_to="none", save_strategy="no",
        logging_strategy="no", disable_tqdm=True, use_cpu=not gpu, dataloader_num_workers=4 if gpu else 0,
        dataloader_pin_memory=gpu, remove_unused_columns=False)


def for_llava(rows: list[BatchRow], *, processor: OneDiffProcessor, pixels_of: Pixels) -> dict[str, Tensor]:
    """Collate training rows into the inputs of LlavaForConditionalGeneration."""
    batch = processor.answers([row.prompt for row in rows])
    del batch["image_counts"]
    names = [name for row in rows for name in row.images]
    return batch | ({"pixel_values": pixels_of(names)["images"]} if names else {})


def overhead(bench: Bench, turn: Turn, model: OneDiffForConditionalGeneration, processor: OneDiffProcessor) -> None:
    """Run `fit` on batches that are already in memory, and measure the time outside DeepSpeed.

    `turn.facts` gets two lists: `total_s`, the seconds of each step, and `engine_s`, the seconds of the step inside
    DeepSpeed's `forward`, `backward` and `step`.
    """
    engine_s: list[float] = []
    start = time.perf_counter()

    @contextmanager
    def clocked() -> Iterator[None]:
        begin = time.perf_counter()
        yield
        engine_s.append(time.perf_counter() - begin)

    class ClockedEngine(Engine):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            for call in ("forward", "backward", "step"):
                setattr(self._engine, call, clocked()(getattr(self._engine, call)))

    def log(step: int, values: dict[str, float]) -> None:
        nonlocal start
        if step:  # Step 0 is the warm-up, which is not measured.
            turn.facts["total_s"].append(time.perf_counter() - start)
            turn.facts["engine_s"].append(sum(engine_s))
        turn()
        engine_s.clear()
        start = time.perf_counter()

    pixels_of = decode(bench.corpus, processor)
    batches = [[collate(rows, processor, pixels_of)] for rows in bench.batches]
    turn.facts |= {"total_s": [], "engine_s": []}
    setattr(loop, "Engine", ClockedEngine)  # noqa: B010
    with TemporaryDirectory() as folder:
        loop.fit(bench.training_run(model, processor, Path(folder)), lambda first, rank: cycle(batches), log,
                 Meter(lambda counts: 0.0, None))


def attention(bench: Bench, turn: Turn, model: OneDiffForConditionalGeneration, processor: OneDiffProcessor) -> None:
    """Run forward and backward passes with one way to compute attention, without weight updates.

    The images are replaced by their vision features before the measurement.
    """
    kind = bench.case["attention"]
    pixels_of = decode(bench.corpus, processor)
    trainable(model.train(), bench.phase)
    if kind.endswith("inside attention"):
        packing._by_row = partial(padded_inside, alike=ALIKE if kind.startswith("alike") else 0.0)
    rows_of = shuffled(bench.batches)
    ready = []
    for rows in map(rows_of, range(bench.case["units"])):
        if kind == "padded rows, grouped":
            rows.sort(key=lambda row: len(processor.encode_turns(row.prompt)[0]))
        size = len(rows) // 4 if kind == "padded rows, grouped" else len(rows)
        ready.append([_with_states(model, collate(rows[start : start + size], processor, pixels_of))
                      for start in range(0, len(rows), size)])
    for batches in cycle(ready):
        for batch in batches:
            loss = (padded_rows(model, batch) if kind.startswith("padded rows") else
                    model(**batch, total_weight=torch.tensor(1000)).loss)
            loss.backward()
        model.zero_grad()
        turn()


@torch.no_grad()
def _with_states(model: OneDiffForConditionalGeneration, batch: Batch) -> Batch:
    """Replace the images of a batch by the features that the vision encoder computes from them."""
    images = batch.pop("images")
    return batch | ({"states": model.vision(images)} if len(images) else {})


def padded_rows(model: OneDiffForConditionalGeneration, batch: Batch) -> Tensor:
    """Compute the loss on padded rows instead of packed rows, with logits only for answer tokens."""
    embeds, _ = model.embed(batch["input_ids"], batch["image_counts"], images=batch.get("images"),
                            states=batch.get("states"))
    hidden = model.language.get_decoder()(inputs_embeds=embeds,
                                          attention_mask=batch["attention_mask"]).last_hidden_state
    targets = functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
    is_answer = targets != IGNORED
    return functional.cross_entropy(model.language.get_output_embeddings()(hidden[is_answer]), targets[is_answer],
                                    reduction="sum") / 1000


def padded_inside(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scaling: float | None, window: int,
                  *, alike: float) -> Tensor:
    """Compute causal attention of packed rows like `packing._by_row`, with one call for each group of similar length.

    The rows of a group are padded to the longest row. No row is shorter than `alike` times the longest row.
    """
    assert window >= max(lengths), "the measured decoders have no sliding window"
    positions, shapes = layout(tuple(lengths), alike)
    size = sum(rows * longest for rows, longest in shapes)

    def padded(x: Tensor) -> list[Tensor]:  # (1, heads, tokens, width) -> each group (rows, heads, longest, width)
        flat = x[0].transpose(0, 1)
        flat = flat.new_zeros(size, *flat.shape[1:]).index_copy(0, positions, flat)
        parts = flat.split([rows * longest for rows, longest in shapes])
        return [part.unflatten(0, shape).transpose(1, 2) for part, shape in zip(parts, shapes, strict=True)]

    mixed = [functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling,
                                                     enable_gqa=q.shape[1] != k.shape[1])
             for q, k, v in zip(padded(query), padded(key), padded(value), strict=True)]
    flat = torch.cat([part.transpose(1, 2).flatten(0, 1) for part in mixed]) if len(mixed) > 1 else (
        mixed[0].transpose(1, 2).flatten(0, 1))
    return flat.index_select(0, positions)[None]


@lru_cache(maxsize=8)
def layout(lengths: tuple[int, ...], alike: float) -> tuple[Tensor, list[tuple[int, int]]]:
    """Return the position of each packed token in the padded rows, and (number of rows, padded length) of each group.

    The group with the longest rows comes first. `lengths` are the lengths of the packed rows in tokens.
    """
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if not groups or lengths[row] < alike * lengths[groups[-1][0]]:
            groups.append([])
        groups[-1].append(row)
    starts, start = {}, 0
    for group in groups:
        for row in group:
            starts[row], start = start, start + lengths[group[0]]
    positions = torch.cat([starts[row] + torch.arange(length) for row, length in enumerate(lengths)])
    return positions, [(len(group), lengths[group[0]]) for group in groups]


if __name__ == "__main__":
    turns.run_script(main, contender)
