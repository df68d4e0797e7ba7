"""What a run will take, before any GPU is touched: `onediff plan`. Nothing is downloaded, no weight is loaded.

Of each phase: what learns, what a sample is, how many steps, what fits on which GPU, how many hours.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import get_args

from onediff.config import Align, Config, Model, Phase, Runtime
from onediff.data.sources.catalog import CATALOG
from onediff.inputs.prompt import COUPLED_INSTRUCTION, DEFAULT_INSTRUCTION, IMAGE, pair_prompt, text_prompt
from onediff.model.assemble import configure
from onediff.model.configuration import OneDiffConfig
from onediff.train.cost import Flops, Gpu, Size, sizes
from onediff.train.memory import Offload, Rows, Saved, Sharing, States, hollow, saved, states
from onediff.train.phases import steps_of

ARCHITECTURES = Path("presets/architectures")
CARD = Path("data/diffcap/card.json")
GIB = 2**30
SPARE, OVERHEAD_GIB = 0.05, 1.5  # of a GPU's memory: lost between blocks; taken by CUDA and NCCL
ENOUGH_TOKENS = 4096  # of a forward pass, on one GPU: beyond it a larger one is hardly faster
TOKENS_PER_WORD = 4 / 3
ANSWER_TOKENS = {"birds_to_words": 45, "llava_665k": 250}  # estimates, like all lengths of text here
USUAL_ANSWER_TOKENS, CONVERSATION_TOKENS = 16, 150  # the latter: the questions of a conversation
CONVERSATIONS = {"llava_665k": 0.94}  # the share that has an image
MERGED = ("spot_the_diff", "clevr_change")  # their official records are not the pairs that are read
SCENE_PAIRS = 3  # that a base scene gives `train`


@dataclass(frozen=True)
class Sample:
    """Means over a phase's mixture; `longest_tokens` of a row that a micro-batch must have room for."""

    images: float
    pairs: float
    text_tokens: float
    answer_tokens: float
    tokens: float
    longest_tokens: int


@dataclass(frozen=True)
class Layout:
    """One way to share a phase between the GPUs; `micro_batch_size` 0: not even one row fits. Bytes of one
    GPU."""

    sharing: Sharing
    checkpoint_activations: bool
    states: States
    activations: float  # of each row
    micro_batch_size: int
    total: float  # with that micro-batch, or with one row


@dataclass(frozen=True)
class PhasePlan:
    name: str
    sizes: dict[str, Size]
    sample: Sample
    num_samples: dict[str, tuple[int, str]]  # by source, and where the number is from
    steps: int
    batch_size: int
    cached_tower: bool
    flops_per_step: float
    hours: float
    layouts: list[Layout]
    chosen: Layout | None


@dataclass(frozen=True)
class Plan:
    gpu: Gpu
    num_gpus: int
    utilisation: float
    published: list[str]  # backbones described by their published architecture, not downloaded
    patch_tokens: int
    delta_tokens: int
    phases: list[PhasePlan]


def plan(config: Config, runtime: Runtime, *, gpu: Gpu, num_gpus: int, utilisation: float) -> Plan:
    """Raises ValueError if a batch does not split over the GPUs or a backbone contradicts params.yaml."""
    described, published = described_model(config.model)
    model = configure(described)
    phases = [plan_phase(name, config, model, runtime, gpu=gpu, num_gpus=num_gpus, utilisation=utilisation)
              for name in ("align", "tune") if getattr(config, name) is not None]
    views = 1 if model.reading == "C" else 2
    return Plan(gpu, num_gpus, utilisation, published, views * model.tokens_per_image, model.delta_tokens_read, phases)


def described_model(model: Model) -> tuple[Model, list[str]]:
    """The model with the names whose architecture is known here replaced by its folder, and those names."""
    known = [name for name in dict.fromkeys((model.vision.path, model.language))
             if not Path(name).exists() and (ARCHITECTURES / name / "config.json").exists()]
    place = {name: str(ARCHITECTURES / name) for name in known}
    vision = model.vision.model_copy(update={"path": place.get(model.vision.path, model.vision.path)})
    return model.model_copy(update={"vision": vision, "language": place.get(model.language, model.language)}), known


def plan_phase(name: str, config: Config, model: OneDiffConfig, runtime: Runtime, *, gpu: Gpu, num_gpus: int,
               utilisation: float) -> PhasePlan:
    phase: Phase = getattr(config, name)
    if phase.batch_size % num_gpus:
        raise ValueError(f"params.yaml: {name}.batch_size {phase.batch_size} does not split over {num_gpus} GPUs; "
                         "change one of them")
    samples = {source: count_samples(source, config, phase) for source in phase.mixture}
    sample, total = mean_sample(config, model, phase), sum(number for number, _ in samples.values())
    num_images = total if name == "align" else total * sample.images
    cached = not phase.lr_vision and _feature_bytes(model, num_images) <= runtime.feature_cache_gb * 1e9
    empty = hollow(model, phase)
    counts = {key: getattr(sample, key) * phase.batch_size for key in ("images", "pairs", "tokens", "answer_tokens")}
    flops, steps = Flops.of(empty, phase, cached_tower=cached)(counts), steps_of(phase, total)
    once = Flops.of(empty, phase, cached_tower=False).image * num_images if cached else 0.0  # a frozen tower: forward
    seconds = (steps * flops + once) / (num_gpus * gpu.tflops * 1e12 * utilisation)
    found = list(layouts(model, phase, sample, _added(sizes(empty)), gpu=gpu, num_gpus=num_gpus, cached_tower=cached,
                         bfloat16=config.model.precision == "bfloat16"))
    return PhasePlan(name, sizes(empty), sample, samples, steps, phase.batch_size, cached, flops, seconds / 3600,
                     found, choose(found, sample))


def _feature_bytes(model: OneDiffConfig, num_images: float) -> float:
    return num_images * len(model.read_levels) * model.num_patches * model.vision_config.hidden_size * 4


def _added(parts: dict[str, Size]) -> Size:
    return Size(sum(part.learning for part in parts.values()), sum(part.frozen for part in parts.values()))


# --- samples ----------------------------------------------------------------------------------------------------------


def count_samples(source: str, config: Config, phase: Phase) -> tuple[int, str]:
    """Samples of an epoch, and where the number is from: DiffCap's card, params.yaml, an official count or a guess."""
    task = config.tasks.get(source)
    expected = CATALOG[source].expected.get("train", {}) if source in CATALOG else {}
    each = expected.get("references", 0) / expected["pairs"] if expected.get("references") else 1.0
    times = each if task and task.targets == "each" else 1.0
    if CARD.exists():
        kinds = json.loads(CARD.read_text(encoding="utf-8"))["num_pairs"]["train"].get(source, {})
        if kinds:
            return round(sum(kinds.values()) * times), str(CARD)
    found = _expected_pairs(source, config)
    if found:
        return round(found * times), "params.yaml" if source in config.data.generated else "official count"
    ratios = [known / weight for other, weight in phase.mixture.items() if (known := _expected_pairs(other, config))]
    scale = median(ratios) if ratios else 1000.0
    return round(phase.mixture[source] * scale), "guess from its weight"


def _expected_pairs(source: str, config: Config) -> int | None:
    if source == "scenes":
        return SCENE_PAIRS * config.data.scenes.num_scenes.train
    if source == "edits":
        return config.data.edits.num_pairs.train
    expected = CATALOG[source].expected.get("train", {}) if source in CATALOG else {}
    return expected.get("pairs" if source in MERGED else "records")


def mean_sample(config: Config, model: OneDiffConfig, phase: Phase) -> Sample:
    """Weighted as the phase draws; a pair has two images, a conversation one or none."""
    whole, kinds = sum(phase.mixture.values()), []
    for source, weight in phase.mixture.items():
        seen, words, said = _text_of(source, config, phase)
        views, paired = min(seen, 1.0) if model.reading == "C" else seen, float(seen == 2)
        length = views * model.tokens_per_image + paired * model.delta_tokens_read + words
        kinds.append((weight / whole, seen, paired, words, said, min(length, config.model.max_length)))
    images, pairs, text, answer, tokens = (sum(kind[0] * kind[column] for kind in kinds) for column in range(1, 6))
    talks = CONVERSATIONS.keys() & phase.mixture.keys()
    longest = config.model.max_length if talks else round(max(kind[5] for kind in kinds))
    return Sample(images, pairs, text, answer, tokens, longest)


def _text_of(source: str, config: Config, phase: Phase) -> tuple[float, float, float]:
    """Images, tokens of text with the answer, tokens of the answer alone."""
    answer, task = float(ANSWER_TOKENS.get(source, USUAL_ANSWER_TOKENS)), config.tasks.get(source)
    if source in CONVERSATIONS:
        return CONVERSATIONS[source], CONVERSATION_TOKENS + answer, answer
    instruction = (task and task.instruction) or DEFAULT_INSTRUCTION
    if isinstance(phase, Align):
        instruction = COUPLED_INSTRUCTION
        if phase.samples == "single":
            question = text_prompt(config.model.template, instruction).question
            return 1.0, len(question.split()) * TOKENS_PER_WORD + answer, answer
        answer *= 2
    if task and task.targets == "joined":
        answer *= 2
    question = pair_prompt(config.model.template, instruction).question.replace(IMAGE, "")
    return 2.0, len(question.split()) * TOKENS_PER_WORD + answer, answer


# --- what fits --------------------------------------------------------------------------------------------------------


def layouts(model: OneDiffConfig, phase: Phase, sample: Sample, size: Size, *, gpu: Gpu, num_gpus: int,
            cached_tower: bool, bfloat16: bool) -> Iterator[Layout]:
    """Every ZeRO level, offload and checkpointing that Runtime allows, and the largest micro-batch that each holds."""
    answer = max(1, round(sample.answer_tokens))
    one, two = (saved(model, phase, Rows(pairs, sample.longest_tokens, answer), bfloat16=bfloat16,
                      cached_tower=cached_tower) for pairs in (1, 2))
    room = usable_gib(gpu) * GIB
    sizes_tried = [number for number in range(1, phase.batch_size // num_gpus + 1)
                   if phase.batch_size // num_gpus % number == 0]
    for offload in get_args(Offload):
        for level in range({"none": 0, "optimizer": 1, "all": 3}[offload], 4):
            sharing = Sharing(level, offload, num_gpus)
            kept = states(size, sharing, bfloat16=bfloat16)
            for again in (False, True):
                fitting = [number for number in sizes_tried if total_bytes(kept, one, two, number, again=again) <= room]
                most = max(fitting, default=0)
                yield Layout(sharing, again, kept, _kept(two, again) - _kept(one, again), most,
                             total_bytes(kept, one, two, most or 1, again=again))


def usable_gib(gpu: Gpu) -> float:
    return gpu.memory_gib * (1 - SPARE) - OVERHEAD_GIB


def total_bytes(kept: States, one: Saved, two: Saved, num_rows: int, *, again: bool) -> float:
    """At the worst moment: the start of the backward pass, the update, when no activation is left, or the beginning,
    when every GPU loads the whole model.
    """
    activations = (_kept(one, again) + (num_rows - 1) * (_kept(two, again) - _kept(one, again))
                   + one.working + (num_rows - 1) * (two.working - one.working))
    held = kept.weights + kept.gradients + kept.optimizer + kept.buffers
    return max(held + max(activations, kept.update), kept.start)


def _kept(found: Saved, again: bool) -> int:
    return found.checkpointed if again else found.everything


def choose(found: list[Layout], sample: Sample) -> Layout | None:
    """The least offload; of these a pass with enough tokens to keep the GPU busy; then nothing run twice, then the
    lowest ZeRO level. None: nothing fits.
    """
    fitting = [layout for layout in found if layout.micro_batch_size]
    return min(fitting, default=None, key=lambda layout: (
        get_args(Offload).index(layout.sharing.offload),
        layout.micro_batch_size * sample.longest_tokens < ENOUGH_TOKENS,
        layout.checkpoint_activations, layout.sharing.zero_level))


# --- for people -------------------------------------------------------------------------------------------------------


def text(found: Plan) -> str:
    gpu = found.gpu
    lines = [f"On {found.num_gpus} x {gpu.name} ({gpu.memory_gib:g} GiB, {gpu.tflops:g} TFLOP/s"
             f"{' in bfloat16' if gpu.bfloat16 else ' in float16; it has no bfloat16'}), at {found.utilisation:.0%} of "
             "that peak. Nothing was run or downloaded."]
    lines += [f"{name}: architecture as published, not downloaded" for name in found.published]
    lines += [f"A pair: {found.patch_tokens:,} patch tokens, {found.delta_tokens} delta tokens, and text "
              "(its length is an estimate)"]
    return "\n".join([*lines, *(line for phase in found.phases for line in _phase_text(phase, found))])


def _phase_text(phase: PhasePlan, found: Plan) -> Iterator[str]:
    sample = phase.sample
    yield f"\n{phase.name}\n  parameters {'learning':>12} {'frozen':>12}"
    for part, size in phase.sizes.items():
        yield f"  {part:<10} {_millions(size.learning):>12} {_millions(size.frozen):>12}"
    width = max(map(len, phase.num_samples))
    for title, (source, (number, origin)) in zip(["samples", *[""] * len(phase.num_samples)],
                                                 phase.num_samples.items(), strict=False):
        yield f"  {title:<10} {number:>12,}  {source:<{width}}  {origin}"
    yield (f"  steps      {phase.steps:>12,}  of {phase.batch_size} samples; on average {sample.images:.2g} images, "
           f"{sample.tokens:,.0f} tokens, {sample.answer_tokens:.0f} of them answers")
    seen = ("frozen, its features computed once" if phase.cached_tower else
            "runs at every step" + ("" if phase.sizes["vision"].learning else
                                    ": frozen, but its features exceed feature_cache_gb of runtime.yaml"))
    yield f"  tower      {seen}"
    yield f"  compute    {phase.flops_per_step / 1e15:>12,.4g}  PFLOP a step"
    yield f"  time       {phase.hours:>12,.2g}  hours, without reading data, validation and checkpoints"
    yield (f"  memory of one GPU in GiB, of which {usable_gib(found.gpu):.1f} can be used ({OVERHEAD_GIB} are for CUDA "
           f"and NCCL, {SPARE:.0%} for gaps); rows of {sample.longest_tokens:,} tokens")
    yield ("    ZeRO  offload    checkpoint | weights  gradients  optimizer  buffers  each row | largest micro-batch: "
           "total")
    for layout in phase.layouts:
        yield f"  {'->' if layout is phase.chosen else '  '}{_layout_text(layout)}"
    yield f"  {_advice(phase)}"


def _layout_text(layout: Layout) -> str:
    kept = layout.states
    shares = [f"{value / GIB:>{width}.1f}" for value, width in (
        (kept.weights, 7), (kept.gradients, 10), (kept.optimizer, 10), (kept.buffers, 8), (layout.activations, 9))]
    most = f"{layout.micro_batch_size:>19}" if layout.micro_batch_size else "       does not fit"
    return (f"  {layout.sharing.zero_level}   {layout.sharing.offload:<10} {_yes(layout.checkpoint_activations):<10} | "
            f"{' '.join(shares)} | {most}: {layout.total / GIB:.1f}")


def _advice(phase: PhasePlan) -> str:
    layout = phase.chosen
    if layout is None:
        cures = ["more or larger GPUs", "model.patch_pool 2 or reading C: fewer patch tokens", "a lower max_length"]
        if phase.sizes["language"].learning:
            cures.insert(0, f"{phase.name}.lora in place of the whole language model")
        return f"does not fit, not even with one row, all offloaded. What helps: {'; '.join(cures)}"
    host = f"; {layout.states.host / GIB:.0f} GiB of the CPU's memory for each GPU" if layout.states.host else ""
    return (f"runtime.yaml: zero_level: {layout.sharing.zero_level}, offload: {layout.sharing.offload}, "
            f"checkpoint_activations: {_yes(layout.checkpoint_activations)}, micro_batch_size: "
            f"{layout.micro_batch_size}{host}")


def _yes(value: bool) -> str:
    return "true" if value else "false"


def _millions(number: int) -> str:
    return f"{number / 1e6:,.2f}M" if number else "-"
