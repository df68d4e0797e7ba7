"""A training step of OneDiff against transformers' LLaVA that reads both images; one table.

    python -m benchmarks.train_step                           # tiny: align, tune on pairs, tune on mixed lengths
    python -m benchmarks.train_step --preset small --rounds 2
    python -m benchmarks.train_step --overhead                # our loop over DeepSpeed's forward, backward, step
    python -m benchmarks.train_step --attention               # what packing may do inside attention
    python -m benchmarks.train_step --preset paper --device cuda --work align --work pairs --lora   # not run here

OneDiff is what a phase runs: corpus, loader, packed rows, engine with clipping and fused AdamW, all inside `fit`. The
peer is LlavaForConditionalGeneration under transformers' Trainer at its best: rows grouped by length, padded on the
right, SDPA, fused AdamW, clipping, no logging, no saving; what is frozen in ours is frozen in it. It reads every patch
of both images, so "all patches" (patch_pool 1, reading A) is the like-for-like row, the VDM's work coming on top;
"cached" has the frozen tower's features from the store, as `fit` has them by default, and "as preset" its pooling,
reading and masked rows, too. All contenders see the same rows, images and texts (benchmarks/rows.py); sizes stand in
benchmarks/models.py.

A step runs from the end of the one before to its own end, so loading counts. A round is `--units` steps of each
contender, step by step in turn, in processes of their own; the ratio is taken round by round: its median, lowest and
highest. Peak memory is the process's (on a GPU: of its memory); "to learn" what came on top of the loaded model.
GFLOP/s by onediff.train.cost: 6, 4 or 2 for each weight and token, padding and recomputation not counted; on a GPU also
MFU. On a GPU the contenders run one after the other, and the peer keeps weights and AdamW in bfloat16 alone (ours also
in float32).
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from benchmarks import models, turns
from benchmarks import rows as benchmark_rows
from benchmarks.turns import Contender, Ended, Turn
from onediff.config import Config, Lora, Phase, Runtime
from onediff.train.engine import learning_rates

if TYPE_CHECKING:
    from torch import Tensor

    from onediff.data.batches.corpus import Corpus
    from onediff.data.batches.loader import Batch, Pixels
    from onediff.data.batches.sampling import BatchRow
    from onediff.inputs.processing import OneDiffProcessor
    from onediff.model.onediff import OneDiffForConditionalGeneration
    from onediff.train.loop import TrainingRun

PEER = "LLaVA, Trainer"
KINDS: dict[str, dict[str, Any]] = {
    PEER: {"peer": True},
    "OneDiff, all patches": {"model": models.ALL_PATCHES, "cached": False},
    "OneDiff, all patches, cached": {"model": models.ALL_PATCHES, "cached": True},
    "OneDiff, as preset": {"model": {}, "cached": True, "masked": True},
}
ATTENTIONS = ("row by row", "padded inside attention", "alike rows inside attention", "padded rows",
              "padded rows, grouped")
WORKS = ("align", "pairs", "mixed")
BATCH = {"tiny": 32, "small": 8, "paper": 16}
UNITS = {"align": 1, "pairs": 1, "mixed": 2}
FOREVER = 10**6
ALIKE = 0.8  # of a group's longest row


def main(preset: Annotated[str, typer.Option(help=f"One of {', '.join(models.PRESETS)}.")] = "tiny",
         work: Annotated[list[str] | None, typer.Option(help=f"Any of {', '.join(WORKS)}; all without.")] = None,
         only: Annotated[list[str] | None, typer.Option(help="Names of contenders; all without.")] = None,
         rounds: int = 2, units: Annotated[int | None, typer.Option(help="Steps of each in a round.")] = None,
         batch: Annotated[int | None, typer.Option(help="Rows of a step.")] = None, device: str = "cpu",
         lora: bool = False, checkpoint_activations: bool = False,
         micro: Annotated[int | None, typer.Option(help="Rows of a micro-batch; the whole batch without.")] = None,
         threads: int = 1, attention: bool = False, overhead: bool = False) -> None:
    """Times of training steps, ours and the peer's."""
    for name in work or ():
        if name not in WORKS:
            raise ValueError(f"--work {name}: must be one of {', '.join(WORKS)}")
    models.settings(preset)
    shared = {"preset": preset, "batch": batch or BATCH[preset], "device": device, "lora": lora, "micro": micro,
              "checkpoint_activations": checkpoint_activations, "threads": threads}
    title = f"{preset}, {shared['batch']} rows a step, {device}" + (f", {threads} threads" if device == "cpu" else "")
    how = {"rounds": rounds, "threads": threads, "together": device == "cpu"}
    if overhead:
        _show_overhead(title, {name: shared | {"work": name, "units": units or UNITS[name]} for name in work or WORKS},
                       how)
        return
    table = Table("work", "contender", "rows/s", "tokens/s", "GFLOP/s", "MFU", "peak GiB", "to learn", "times the peer",
                  title=title)
    for name in work or (WORKS if not attention else ("pairs", "mixed")):
        each = units or UNITS[name]
        kinds = {kind: {"attention": kind, "model": models.ALL_PATCHES} for kind in ATTENTIONS} if attention else KINDS
        contenders = [Contender(kind, "benchmarks.train_step", shared | case | {"work": name, "units": each})
                      for kind, case in kinds.items() if not only or kind in only or kind == next(iter(kinds))]
        turns.race(contenders, units=each, **how)  # type: ignore[arg-type]
        for contender in contenders:
            table.add_row(name, contender.name, *_figures(contender, contenders[0]))
        table.add_section()
    turns.show(table)


def _figures(contender: Contender, peer: Contender) -> list[str]:
    facts, seconds = contender.facts, median(contender.rounds)
    flops = facts["flops"] / seconds
    return [f"{facts['rows'] / seconds:.2f}", f"{facts['tokens'] / seconds:.0f}", f"{flops / 1e9:.1f}",
            f"{flops / facts['peak_flops']:.1%}" if facts["peak_flops"] else "",
            f"{facts['memory_gib']:.2f}", f"{facts['memory_gib'] - facts['loaded_gib']:.2f}",
            "1" if contender is peer else turns.with_range(turns.ratios(contender, peer))]


def _show_overhead(title: str, cases: dict[str, dict[str, Any]], how: dict[str, Any]) -> None:
    table = Table("work", "seconds a step", "in DeepSpeed's forward, backward, step", "our loop's share", title=title)
    for name, case in cases.items():
        contender = Contender("fit", "benchmarks.train_step", case | {"overhead": True, "model": models.ALL_PATCHES})
        turns.race([contender], units=case["units"], **how)
        total, inside = sum(contender.facts["total_s"]), sum(contender.facts["engine_s"])
        each = [1 - ours / whole for ours, whole in
                zip(contender.facts["engine_s"], contender.facts["total_s"], strict=True)]
        steps = len(each)
        table.add_row(name, f"{total / steps:.3f}", f"{inside / steps:.3f}", turns.with_range(each, ".2%"))
    turns.show(table)


# --- in a contender's process -----------------------------------------------------------------------------------------


class Bench:
    """A case: phase, rows and corpus, the same for all contenders of a work."""

    def __init__(self, case: dict[str, Any]) -> None:
        from onediff.data.batches.corpus import Corpus

        self.case, self.name = case, "align" if case["work"] == "align" else "tune"
        self.config = models.settings(case["preset"], **case.get("model", {}))
        self.phase = phase_of(self.config, self.name, case)
        folder = benchmark_rows.shards_of(self.config)
        corpus = Corpus.read(folder, "train", self.phase.mixture,
                             store=benchmark_rows.store_of(folder, self.phase.mixture))
        drawn = benchmark_rows.drawn_rows(corpus, self.config, self.phase, name=self.name,
                                          masked=case.get("masked", False))
        alike = models.processor_of(models.settings_without_delta(self.config))  # the peer's lengths, for all of them
        self.batches = benchmark_rows.grouped(drawn, alike, batch_size=case["batch"], num=case["units"])
        self.corpus: Corpus = benchmark_rows.only_seen(corpus, self.batches)

    @property
    def runtime(self) -> Runtime:
        return Runtime(device=self.case["device"], checkpoint_every_s=1e9, scratch=str(models.HOME / "scratch"),
                       micro_batch_size=self.case["micro"], feature_cache_gb=20.0 if self.case.get("cached") else 0.0,
                       checkpoint_activations=self.case["checkpoint_activations"],
                       loader_workers=None if self.case["device"] == "cuda" else 0)

    def training(self, model: OneDiffForConditionalGeneration, processor: OneDiffProcessor,
                 folder: Path) -> TrainingRun:
        from onediff.train.loop import TrainingRun

        return TrainingRun(self.name, self.phase, self.runtime, folder, model, processor, self.corpus,
                           benchmark_rows.shuffled(self.batches), FOREVER)

    def facts(self, processor: OneDiffProcessor, config: Config, *, cached: bool) -> dict[str, Any]:
        """Of a round: rows, tokens and useful FLOPs; and what the hardware could do in a second."""
        import torch

        from onediff.model.onediff import OneDiffForConditionalGeneration
        from onediff.train.cost import Flops, peak_tflops
        from onediff.train.speed import COUNTED, counts_of

        text = [processor.answers([row.prompt for row in batch]) for batch in self.batches]
        counts = dict(zip(COUNTED, counts_of(text), strict=True))
        with torch.device("meta"):
            bare = OneDiffForConditionalGeneration(models.configuration_of(config, processor))
        peak = peak_tflops(torch.cuda.get_device_name()) if self.case["device"] == "cuda" else None
        return {"rows": counts["rows"], "tokens": counts["tokens"], "peak_flops": peak and peak * 1e12,
                "flops": Flops.of(bare, self.phase, cached_tower=cached and not self.phase.lr_vision)(counts)}


def phase_of(config: Config, name: str, case: dict[str, Any]) -> Phase:
    """The preset's phase, for as long as there are turns."""
    phase: Phase = getattr(config, name)
    mixture = {"scenes": 1.0} if name == "align" else benchmark_rows.MIXTURES[case["work"]]
    lora = Lora(rank=64, alpha=128) if case["lora"] and phase.lr_language else None
    return phase.model_copy(update={"mixture": mixture, "steps": FOREVER, "epochs": None, "batch_size": case["batch"],
                                    "validate_every": None, "lora": lora, "warmup": 0.0})


def contender(case: dict[str, Any], turn: Turn) -> None:
    import torch

    if case["device"] == "cpu":
        torch.set_num_threads(case["threads"])
    if case.get("attention"):
        attention(Bench(case), turn)
    elif case.get("overhead"):
        overhead(Bench(case), turn)
    elif case.get("peer"):
        llava(Bench(case), turn)
    else:
        onediff(Bench(case), turn)


def go_on(turn: Turn, *_: Any) -> None:
    if not turn():
        raise Ended


def onediff(bench: Bench, turn: Turn) -> None:
    """A phase of ours as it is, for as long as there are turns."""
    from onediff.train import phases

    model, processor = models.onediff(bench.config, bench.case["device"])
    turn.facts |= bench.facts(processor, bench.config, cached=bench.case["cached"]) | {"loaded_gib": turns.peak_gib()}
    with tempfile.TemporaryDirectory() as folder:
        phases.train(bench.training(model, processor, Path(folder)), partial(go_on, turn))


def llava(bench: Bench, turn: Turn) -> None:
    from transformers import Trainer, TrainerCallback

    from onediff.data.batches.loader import decode
    from onediff.train import lora

    class Turns(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            go_on(turn)

    model, processor = models.llava(bench.config, bench.case["device"])
    rates = learning_rates(bench.phase)
    if bench.phase.lora:
        lora.add(model, bench.phase.lora)
    for name, parameter in model.named_parameters():
        part = ("vision" if "vision_tower" in name else "projector" if "multi_modal_projector" in name else "language")
        parameter.requires_grad_(rates[part] > 0 and (part != "language" or not bench.phase.lora
                                                      or lora.is_adapter(name)))
    without = models.settings_without_delta(bench.config)
    turn.facts |= bench.facts(processor, without, cached=False) | {"loaded_gib": turns.peak_gib()}
    rows = [row for batch in bench.batches for row in batch]
    with tempfile.TemporaryDirectory() as folder:
        collator = partial(for_llava, processor=processor, pixels_of=decode(bench.corpus, processor))
        Trainer(model=model, args=trainer_arguments(bench, folder), train_dataset=rows, callbacks=[Turns()],
                data_collator=collator).train()


def trainer_arguments(bench: Bench, folder: str) -> Any:
    """The rows come grouped by length already (benchmarks.rows.grouped)."""
    from transformers import TrainingArguments

    case, phase, gpu = bench.case, bench.phase, bench.case["device"] == "cuda"
    size = case["micro"] or case["batch"]
    return TrainingArguments(
        output_dir=folder, max_steps=FOREVER, per_device_train_batch_size=size,
        gradient_accumulation_steps=case["batch"] // size, train_sampling_strategy="sequential",
        optim="adamw_torch_fused", learning_rate=max(learning_rates(phase).values()), weight_decay=phase.weight_decay,
        max_grad_norm=phase.clip_norm, lr_scheduler_type="cosine", report_to="none", save_strategy="no",
        logging_strategy="no", disable_tqdm=True, use_cpu=not gpu, dataloader_num_workers=4 if gpu else 0,
        dataloader_pin_memory=gpu, remove_unused_columns=False, gradient_checkpointing=case["checkpoint_activations"])


def for_llava(rows: list[BatchRow], *, processor: OneDiffProcessor, pixels_of: Pixels) -> dict[str, Tensor]:
    batch = processor.answers([row.prompt for row in rows])
    del batch["image_counts"]
    names = [name for row in rows for name in row.images]
    return batch | ({"pixel_values": pixels_of(names)["images"]} if names else {})


# --- our loop over the bare engine ------------------------------------------------------------------------------------


def overhead(bench: Bench, turn: Turn) -> None:
    """`fit` with batches at hand; facts tell each step's seconds, and those inside DeepSpeed's own three calls."""
    from onediff.data.batches.loader import collate, decode
    from onediff.train import loop
    from onediff.train.engine import Engine
    from onediff.train.speed import Meter

    spent = [0.0]

    class Timed(Engine):
        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **named)
            for call in ("forward", "backward", "step"):
                setattr(self._engine, call, timed(getattr(self._engine, call), spent))

    model, processor = models.onediff(bench.config, bench.case["device"])
    pixels_of = decode(bench.corpus, processor)
    ready = [[collate(rows, processor, pixels_of)] for rows in bench.batches]
    turn.facts |= {"total_s": [], "engine_s": []}
    began = [0.0]

    def log(step: int, values: dict[str, float]) -> None:
        if step:  # the first is the warm-up
            turn.facts["total_s"].append(time.perf_counter() - began[0])
            turn.facts["engine_s"].append(spent[0])
        go_on(turn)
        began[0], spent[0] = time.perf_counter(), 0.0

    setattr(loop, "Engine", Timed)  # noqa: B010
    with tempfile.TemporaryDirectory() as folder:
        loop.fit(bench.training(model, processor, Path(folder)), lambda first, rank: _over_and_over(ready), log,
                 Meter(lambda counts: 0.0, None))


def timed(call: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    def wrapped(*given: Any, **named: Any) -> Any:
        start = time.perf_counter()
        try:
            return call(*given, **named)
        finally:
            spent[0] += time.perf_counter() - start

    return wrapped


def _over_and_over(ready: list[list[Batch]]) -> Iterator[list[Batch]]:
    while True:
        yield from ready


# --- what packing may do inside attention -----------------------------------------------------------------------------


def attention(bench: Bench, turn: Turn) -> None:
    """Forward and backward of one step, the tower's features at hand; no update."""
    import torch

    from onediff.data.batches.loader import collate, decode
    from onediff.model import packing
    from onediff.train.engine import trainable

    kind = bench.case["attention"]
    model, processor = models.onediff(bench.config, bench.case["device"])
    turn.facts |= bench.facts(processor, bench.config, cached=True) | {"loaded_gib": turns.peak_gib()}
    pixels_of = decode(bench.corpus, processor)
    trainable(model.train(), bench.phase)
    if kind.endswith("inside attention"):
        packing._by_row = partial(padded_inside, alike=ALIKE if kind.startswith("alike") else 0.0)
    ours = benchmark_rows.shuffled(bench.batches)
    steps = [ours(step) for step in range(bench.case["units"])]
    parts = 4 if kind == "padded rows, grouped" else 1
    ready = [[_with_states(model, collate(part, processor, pixels_of)) for part in _by_length(rows, processor, parts)]
             for rows in steps]
    loss_of: Callable[[Batch], Tensor] = partial(padded_rows, model) if kind.startswith("padded rows") else (
        lambda batch: model(**batch, num_answer_tokens=torch.tensor(1000)).loss)
    while True:
        for batches in ready:
            for batch in batches:
                loss_of(batch).backward()
            model.zero_grad()
            go_on(turn)


def _with_states(model: OneDiffForConditionalGeneration, batch: Batch) -> Batch:
    import torch

    with torch.no_grad():
        images = batch.pop("images")
        return batch | ({"states": model.vision(images)} if len(images) else {})


def _by_length(rows: list[BatchRow], processor: OneDiffProcessor, parts: int) -> list[list[BatchRow]]:
    if parts == 1:
        return [rows]
    ordered = sorted(rows, key=lambda row: len(processor.encode_turns(row.prompt)[0]))
    size = len(rows) // parts
    return [ordered[part * size : (part + 1) * size] for part in range(parts)]


def padded_rows(model: OneDiffForConditionalGeneration, batch: Batch) -> Tensor:
    """The loss with no packing: whole padded rows, logits for answer tokens alone."""
    from torch.nn import functional

    from onediff.model.onediff import IGNORED

    batch = dict(batch)
    labels, mask, ids = batch.pop("labels"), batch.pop("attention_mask"), batch.pop("input_ids")
    batch.pop("patch_mask", None)
    embeds = model.embed(ids, batch.pop("image_counts"), **batch)
    hidden = model.language.get_decoder()(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
    wanted = functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    asked = wanted != IGNORED
    return functional.cross_entropy(model.language.get_output_embeddings()(hidden[asked]), wanted[asked],
                                    reduction="sum") / 1000


def padded_inside(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scaling: float | None, *,
                  alike: float) -> Tensor:
    """As packing._by_row, in one call for each group of rows of which none is shorter than `alike` of the longest."""
    import torch
    from torch.nn import functional

    places, shapes = layout(tuple(lengths), alike)
    size = sum(rows * longest for rows, longest in shapes)

    def padded(x: Tensor) -> list[Tensor]:  # (1, H, T, W) -> of each group (rows, H, longest, W)
        flat = x[0].transpose(0, 1)
        flat = flat.new_zeros(size, *flat.shape[1:]).index_copy(0, places, flat)
        parts = flat.split([rows * longest for rows, longest in shapes])
        return [part.unflatten(0, shape).transpose(1, 2) for part, shape in zip(parts, shapes, strict=True)]

    mixed = [functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling,
                                                     enable_gqa=q.shape[1] != k.shape[1])
             for q, k, v in zip(padded(query), padded(key), padded(value), strict=True)]
    flat = torch.cat([part.transpose(1, 2).flatten(0, 1) for part in mixed]) if len(mixed) > 1 else (
        mixed[0].transpose(1, 2).flatten(0, 1))
    return flat.index_select(0, places)[None]


@lru_cache(maxsize=8)
def layout(lengths: tuple[int, ...], alike: float) -> tuple[Tensor, list[tuple[int, int]]]:
    """Where each token stands among the padded rows, and rows and length of each group, longest first."""
    import torch

    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if not groups or lengths[row] < alike * lengths[groups[-1][0]]:
            groups.append([])
        groups[-1].append(row)
    starts, start = {}, 0
    for group in groups:
        for row in group:
            starts[row], start = start, start + lengths[group[0]]
    places = torch.cat([starts[row] + torch.arange(length) for row, length in enumerate(lengths)])
    return places, [(len(group), lengths[group[0]]) for group in groups]


if __name__ == "__main__":
    if turns.CASE in os.environ:
        turns.contend(contender)
    else:
        try:
            typer.run(main)
        except (ValueError, OSError) as error:
            sys.exit(f"benchmarks.train_step: {error}")
