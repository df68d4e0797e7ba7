"""`onediff plan`: estimates the memory and time of training, without a GPU, without downloads and without weights.

For each phase, the plan shows the trainable parameters, the mean sample, the number of steps, which settings fit into
the memory of a GPU, and the hours of training.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from onediff.config import Align, Config, Model, Phase, Runtime
from onediff.data.batches.sampling import Turns
from onediff.data.sources.catalog import CATALOG
from onediff.files import read_json
from onediff.inputs.prompt import COUPLED_INSTRUCTION, DEFAULT_INSTRUCTION, IMAGE_MARK, pair_prompt, text_prompt
from onediff.model.assemble import configure
from onediff.model.configuration import OneDiffConfig
from onediff.model.packing import DESCRIPTIONS
from onediff.paths import CARD
from onediff.train.cost import Flops, Gpu, Size, sizes
from onediff.train.loop import steps_of
from onediff.train.memory import MicroBatch, Offload, Saved, Sharing, States, hollow, saved, states
from onediff.train.phases import feature_gb

ARCHITECTURES = Path("presets/architectures")
GIB = 2**30
SPARE = 0.05  # share of GPU memory that is lost to fragmentation
OVERHEAD_GIB = 1.5  # GPU memory that CUDA and NCCL use
ENOUGH_TOKENS = 4096  # number of tokens above which a larger micro-batch hardly increases the speed
TOKENS_PER_WORD = 4 / 3
ANSWER_TOKENS = {"birds_to_words": 45, "llava_665k": 250}  # estimated mean number of answer tokens
USUAL_ANSWER_TOKENS = 16  # estimated mean number of answer tokens for sources that are not in ANSWER_TOKENS
CONVERSATION_TOKENS = 150  # estimated number of tokens of all questions in a conversation
CONVERSATIONS = {"llava_665k": 0.94}  # for each conversation source, the share of conversations that have an image
MERGED = ("spot_the_diff", "clevr_change")  # sources with one sample per image pair, not one per published record
SCENE_PAIRS = 3  # number of training pairs that are generated from one base scene


@dataclass(frozen=True)
class MeanSample:
    """The mean numbers of images and tokens in a training sample, weighted by the sampling weight of each source.

    `longest_tokens` is the number of tokens of the longest sample, which must fit into a micro-batch.
    """

    images: float
    pairs: float
    text_tokens: float
    answer_tokens: float
    tokens: float
    longest_tokens: int


@dataclass(frozen=True)
class Layout:
    """One way to distribute the training of a phase over the GPUs, with the memory of one GPU in bytes.

    `micro_batch_size` is the largest micro-batch that fits, or 0 if not even one row fits. `activations` is the memory
    for the activations of one row. `total` is the total memory with this micro-batch, or with one row if none fits.
    """

    sharing: Sharing
    checkpoint_activations: bool
    states: States
    activations: float
    micro_batch_size: int
    total: float


@dataclass(frozen=True)
class PlannedSource:
    """What a phase trains on from one source.

    `num_samples` is the number of samples of the source (of images in phase `align`), and `origin` says where this
    number is from. `visits` is how often the phase shows each sample on average. `row_share` is the share of the rows
    that come from the source, and `answer_share` that of the answer tokens, on which the model is trained.
    """

    num_samples: int
    origin: str
    visits: float
    row_share: float
    answer_share: float


@dataclass(frozen=True)
class PhasePlan:
    """The plan of one training phase. `rows` says how the language model reads the rows of a batch."""

    name: str
    sizes: dict[str, Size]
    sample: MeanSample
    sources: dict[str, PlannedSource]
    steps: int
    batch_size: int
    rows: str
    cached_tower: bool
    flops_per_step: float
    hours: float
    layouts: list[Layout]
    chosen: Layout | None


@dataclass(frozen=True)
class Plan:
    """The plan of a run; `published` lists backbones of which only the architecture is read, without the weights."""

    gpu: Gpu
    num_gpus: int
    utilisation: float
    published: list[str]
    patch_tokens: int
    delta_tokens: int
    phases: list[PhasePlan]


def plan(config: Config, runtime: Runtime, *, gpu: Gpu, num_gpus: int, utilisation: float) -> Plan:
    """Plan both training phases.

    Raises ValueError if a batch cannot be split evenly over the GPUs, or if a backbone contradicts params.yaml.
    """
    described, published = described_model(config.model)
    model = configure(described)
    patch_tokens = (1 if model.reading == "C" else 2) * model.tokens_per_image
    planned = Plan(gpu, num_gpus, utilisation, published, patch_tokens, model.delta_tokens_read, [])
    return replace(planned, phases=[plan_phase(name, config, model, runtime, planned) for name in ("align", "tune")
                                    if getattr(config, name) is not None])


def described_model(model: Model) -> tuple[Model, list[str]]:
    """Replace each backbone that is not on disk by its folder in presets/architectures, if there is one.

    Returns the changed model settings and the names of the replaced backbones.
    """
    folders = {name: str(ARCHITECTURES / name) for name in (model.vision.path, model.language)
               if not Path(name).exists() and (ARCHITECTURES / name / "config.json").exists()}
    path, language = (folders.get(name, name) for name in (model.vision.path, model.language))
    vision = model.vision.model_copy(update={"path": path})
    return model.model_copy(update={"vision": vision, "language": language}), list(folders)


def plan_phase(name: str, config: Config, model: OneDiffConfig, runtime: Runtime, planned: Plan) -> PhasePlan:
    """Plan the phase `name`; `planned` is the plan so far, which contains the GPUs but no phases."""
    phase: Phase = getattr(config, name)
    if phase.batch_size % planned.num_gpus:
        raise ValueError(f"params.yaml: {name}.batch_size {phase.batch_size} must be a multiple of the "
                         f"{planned.num_gpus} GPUs; change batch_size or the number of GPUs")
    sources = planned_sources(config, model, phase)
    sample, total = mean_sample(config, model, phase), sum(source.num_samples for source in sources.values())
    num_images = total if name == "align" else total * sample.images
    cached = not phase.lr_vision and feature_gb(model, num_images) <= runtime.feature_cache_gb
    empty, bfloat16 = hollow(model, phase), config.model.precision == "bfloat16"
    counts = {key: getattr(sample, key) * phase.batch_size for key in ("images", "pairs", "tokens", "answer_tokens")}
    flops, steps = Flops.of(empty, phase, cached_tower=cached)(counts), steps_of(phase)
    # If features are cached, the frozen vision tower encodes every image once, before training.
    once = Flops.of(empty, phase, cached_tower=False).image * num_images if cached else 0.0
    seconds = (steps * flops + once) / (planned.num_gpus * planned.gpu.tflops * 1e12 * planned.utilisation)
    parts = sizes(empty)
    size = Size(sum(part.learning for part in parts.values()), sum(part.frozen for part in parts.values()))
    held = {sharing: states(size, sharing, bfloat16=bfloat16) for sharing in sharings(planned.num_gpus)}
    one, two = (saved(model, phase, MicroBatch(pairs, sample.longest_tokens, max(1, round(sample.answer_tokens))),
                      bfloat16=bfloat16, cached_tower=cached) for pairs in (1, 2))
    choices = list(layouts(held, one, two, num_rows=phase.batch_size // planned.num_gpus, gpu=planned.gpu))
    return PhasePlan(name, parts, sample, sources, steps, phase.batch_size, DESCRIPTIONS[empty.row_logits],
                     cached, flops, seconds / 3600, choices, choose(choices, sample))


def planned_sources(config: Config, model: OneDiffConfig, phase: Phase) -> dict[str, PlannedSource]:
    """Return what a phase trains on from each source of its mixture."""
    turns, num_rows = Turns(phase.mixture).num_turns, steps_of(phase) * phase.batch_size
    answers = {source: turns[source] * _sample_of(source, config, model, phase).answer_tokens
               for source in phase.mixture}
    is_coupled = isinstance(phase, Align) and phase.samples == "coupled"
    sources = {}
    for source in phase.mixture:
        (number, origin), row_share = count_samples(source, config, phase), turns[source] / turns.total()
        visits = row_share * num_rows * (2 if is_coupled else 1) / number
        sources[source] = PlannedSource(number, origin, visits, row_share, answers[source] / sum(answers.values()))
    return sources


def count_samples(source: str, config: Config, phase: Phase) -> tuple[int, str]:
    """Return the number of samples of a source in one epoch, and a text that names the origin of this number.

    The origin is the data card of DiffCap, params.yaml, an official count, or a guess from the sampling weight.
    """
    task, expected, times = config.tasks.get(source), _official(source), 1.0
    if task and task.targets == "each" and expected.get("references"):
        times = expected["references"] / expected["pairs"]
    if CARD.exists():
        kinds = read_json(CARD)["num_pairs"]["train"].get(source, {})
        if kinds:
            return round(sum(kinds.values()) * times), str(CARD)
    if number := _expected_pairs(source, config):
        return round(number * times), "params.yaml" if source in config.data.generated else "official count"
    return max(1, round(1000 * phase.mixture[source])), "guess from its weight"


def _expected_pairs(source: str, config: Config) -> int | None:
    """Return the number of training samples from params.yaml or from the catalog, or None if it is unknown."""
    if source == "scenes":
        return SCENE_PAIRS * config.data.scenes.num_scenes.train
    if source == "edits":
        return config.data.edits.num_pairs.train
    return _official(source).get("pairs" if source in MERGED else "records")


def _official(source: str) -> Mapping[str, int]:
    return CATALOG[source].expected.get("train", {}) if source in CATALOG else {}


def mean_sample(config: Config, model: OneDiffConfig, phase: Phase) -> MeanSample:
    """Return the mean sample of a phase, weighted by the sampling weight of each source in the mixture."""
    total = sum(phase.mixture.values())
    samples = {source: _sample_of(source, config, model, phase) for source in phase.mixture}
    images, pairs, text, answer, tokens = (
        sum(weight / total * getattr(samples[source], name) for source, weight in phase.mixture.items())
        for name in ("images", "pairs", "text_tokens", "answer_tokens", "tokens"))
    longest = max(sample.longest_tokens for sample in samples.values())
    return MeanSample(images, pairs, text, answer, tokens,
                      config.model.max_length if CONVERSATIONS.keys() & phase.mixture.keys() else longest)


def _sample_of(source: str, config: Config, model: OneDiffConfig, phase: Phase) -> MeanSample:
    images, text, answer = _text_of(source, config, phase)
    views, pairs = min(images, 1.0) if model.reading == "C" else images, float(images == 2)
    tokens = min(views * model.tokens_per_image + pairs * model.delta_tokens_read + text, config.model.max_length)
    return MeanSample(images, pairs, text, answer, tokens, round(tokens))


def _text_of(source: str, config: Config, phase: Phase) -> tuple[float, float, float]:
    """Return the mean number of images, of text tokens including the answer, and of answer tokens in a sample."""
    answer, task = float(ANSWER_TOKENS.get(source, USUAL_ANSWER_TOKENS)), config.tasks.get(source)
    if source in CONVERSATIONS:
        return CONVERSATIONS[source], CONVERSATION_TOKENS + answer, answer
    instruction, is_single = (task and task.instruction) or DEFAULT_INSTRUCTION, False
    if isinstance(phase, Align):
        instruction, is_single = COUPLED_INSTRUCTION, phase.samples == "single"
        answer *= 1 if is_single else 2
    if task and task.targets == "joined" and not is_single:
        answer *= 2
    prompt = (text_prompt if is_single else pair_prompt)(config.model.template, instruction)
    num_words = len(prompt.question.replace(IMAGE_MARK, "").split())
    return 1.0 if is_single else 2.0, num_words * TOKENS_PER_WORD + answer, answer


def sharings(num_gpus: int) -> list[Sharing]:
    """List every combination of ZeRO level and offload that runtime.yaml allows."""
    lowest_levels: dict[Offload, int] = {"none": 0, "optimizer": 1, "all": 3}
    return [Sharing(level, offload, num_gpus) for offload, lowest in lowest_levels.items()
            for level in range(lowest, 4)]


def layouts(held: dict[Sharing, States], one: Saved, two: Saved, *, num_rows: int, gpu: Gpu) -> Iterator[Layout]:
    """Yield a layout for each way to distribute the model states in `held`, without and with activation checkpointing.

    `one` and `two` are the activations of micro-batches with one and two rows, from which larger ones are extrapolated.
    `num_rows` is the number of rows per GPU in a step.
    """
    micro_batch_sizes = [number for number in range(1, num_rows + 1) if num_rows % number == 0]
    for sharing, kept in held.items():
        for checkpointed in (False, True):
            first, second = (rows.checkpointed if checkpointed else rows.everything for rows in (one, two))
            each_row, each_working = second - first, two.working - one.working
            totals = {number: total_bytes(kept, first + one.working + (number - 1) * (each_row + each_working))
                      for number in micro_batch_sizes}
            most = max((number for number in totals if totals[number] <= usable_gib(gpu) * GIB), default=0)
            yield Layout(sharing, checkpointed, kept, each_row, most, totals[most or 1])


def usable_gib(gpu: Gpu) -> float:
    return gpu.memory_gib * (1 - SPARE) - OVERHEAD_GIB


def total_bytes(kept: States, activations: float) -> float:
    """Return the peak memory of one GPU, in bytes.

    The peak is at the start of the backward pass, during the update (when activations are already freed), or at the
    beginning, when every GPU loads the complete model.
    """
    held = kept.weights + kept.gradients + kept.optimizer + kept.buffers
    return max(held + max(activations, kept.update), kept.start)


def choose(layouts: list[Layout], sample: MeanSample) -> Layout | None:
    """Choose the layout that is probably the fastest, or None if no layout fits.

    The order of preference is: least offload, enough tokens in a micro-batch to keep the GPU busy, no activation
    checkpointing, lowest ZeRO level.
    """
    fitting = [layout for layout in layouts if layout.micro_batch_size]
    return min(fitting, default=None, key=lambda layout: (
        get_args(Offload).index(layout.sharing.offload),
        layout.micro_batch_size * sample.longest_tokens < ENOUGH_TOKENS,
        layout.checkpoint_activations, layout.sharing.zero_level))


def text(planned: Plan) -> str:
    """Return the plan as text for the terminal."""
    gpu = planned.gpu
    lines = [f"On {planned.num_gpus} x {gpu.name} ({gpu.memory_gib:g} GiB, {gpu.tflops:g} TFLOP/s"
             f"{' in bfloat16' if gpu.bfloat16 else ' in float16, because this GPU has no bfloat16'}), at "
             f"{planned.utilisation:.0%} of the peak speed. Nothing was run or downloaded."]
    lines += [f"{name}: planned with the published architecture; nothing was downloaded" for name in planned.published]
    lines += [f"A pair has {planned.patch_tokens:,} patch tokens, {planned.delta_tokens} delta tokens, and text of "
              "estimated length"]
    return "\n".join([*lines, *(line for phase in planned.phases for line in _phase_text(phase, planned))])


def _phase_text(phase: PhasePlan, planned: Plan) -> Iterator[str]:
    sample = phase.sample
    yield f"\n{phase.name}\n  parameters {'learning':>12} {'frozen':>12}"
    for part, size in phase.sizes.items():
        yield f"  {part:<10} {_millions(size.learning):>12} {_millions(size.frozen):>12}"
    width = max(map(len, phase.sources))
    yield f"  {'source':<{width}} {'samples':>11}  visits of each    rows  answer tokens  number of samples"
    for name, source in phase.sources.items():
        yield (f"  {name:<{width}} {source.num_samples:>11,} {source.visits:>15.2f} {source.row_share:>7.1%} "
               f"{source.answer_share:>14.1%}  {source.origin}")
    yield f"  rows       {phase.rows}"
    yield (f"  steps      {phase.steps:>12,}  of {phase.batch_size} samples; a sample has on average "
           f"{sample.images:.2g} images and {sample.tokens:,.0f} tokens, {sample.answer_tokens:.0f} of them in answers")
    tower = ("frozen; the features are computed once" if phase.cached_tower else
             "runs at every step" + ("" if phase.sizes["vision"].learning else
                                     ": it is frozen, but the features exceed feature_cache_gb of runtime.yaml"))
    yield f"  tower      {tower}"
    yield f"  compute    {phase.flops_per_step / 1e15:>12,.4g}  PFLOP per step"
    times = ((phase.hours, "hours"), (phase.hours * 60, "minutes"), (phase.hours * 3600, "seconds"))
    time, unit = next((item for item in times if item[0] >= 1), times[-1])
    yield f"  time       {time:>12,.2g}  {unit}, without loading data, validation and checkpoints"
    yield (f"  memory of one GPU in GiB, of which {usable_gib(planned.gpu):.1f} can be used (CUDA and NCCL use "
           f"{OVERHEAD_GIB}, fragmentation {SPARE:.0%}); rows have {sample.longest_tokens:,} tokens")
    yield ("    ZeRO  offload    checkpoint | weights  gradients  optimizer  buffers  each row | largest micro-batch: "
           "total")
    for layout in phase.layouts:
        yield f"  {'->' if layout is phase.chosen else '  '}{_layout_text(layout)}"
    yield f"  {_advice(phase)}"


def _layout_text(layout: Layout) -> str:
    kept = layout.states
    shares = [f"{value / GIB:>{width}.1f}" for value, width in (
        (kept.weights, 7), (kept.gradients, 10), (kept.optimizer, 10), (kept.buffers, 8), (layout.activations, 9))]
    largest = f"{layout.micro_batch_size:>19}" if layout.micro_batch_size else "       does not fit"
    checkpointed = str(layout.checkpoint_activations).lower()
    return (f"  {layout.sharing.zero_level}   {layout.sharing.offload:<10} {checkpointed:<10} | {' '.join(shares)} | "
            f"{largest}: {layout.total / GIB:.1f}")


def _advice(phase: PhasePlan) -> str:
    layout = phase.chosen
    if layout is None:
        cures = ["more or larger GPUs", "fewer patch tokens (model.patch_pool: 2 or model.reading: C)",
                 "a lower model.max_length"]
        if phase.sizes["language"].learning:
            cures.insert(0, f"{phase.name}.lora instead of full training of the language model")
        return f"does not fit, not even with one row and everything offloaded. Possible changes: {'; '.join(cures)}"
    host = f"; needs {layout.states.host / GIB:.0f} GiB of CPU memory for each GPU" if layout.states.host else ""
    return (f"runtime.yaml: zero_level: {layout.sharing.zero_level}, offload: {layout.sharing.offload}, "
            f"checkpoint_activations: {str(layout.checkpoint_activations).lower()}, micro_batch_size: "
            f"{layout.micro_batch_size}{host}")


def _millions(number: int) -> str:
    return f"{number / 1e6:,.2f}M" if number else "-"
