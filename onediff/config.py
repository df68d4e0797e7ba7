"""params.yaml -> one frozen tree. Every value is checked here, once, before any work.

DVC tracks the values, not this file: a new key of one stage must not make the others stale. So nothing here may decide
a result: the sections that a stage reads have no defaults, and no methods but checks (tests/test_config.py).
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(ge=0)]
Port = Annotated[int, Field(ge=1024, le=65535)]
Cosine = Annotated[float, Field(ge=-1, le=1)]
SourceName = Annotated[str, Field(pattern="^[a-z][a-z0-9_]*$")]
T = TypeVar("T", bound="Section")


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


class SplitCounts(Section):
    train: Count
    val: Count
    gate: Count
    test: Count


class Scenes(Section):
    renderer: Literal["raytracer", "blender"]
    num_scenes: SplitCounts
    num_far: Count
    jitter: Rate
    far_jitter: Rate
    min_objects: Annotated[int, Field(ge=2)]
    max_objects: Annotated[int, Field(le=8)]
    min_visible: Share

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_objects > self.max_objects:
            raise ValueError(f"min_objects {self.min_objects} is above max_objects {self.max_objects}")
        return self


class Edits(Section):
    num_pairs: SplitCounts
    canvas_share: Share
    photos: str | None


class Writer(Section):
    """Who writes captions and edit instructions; where it answers and what it costs stands in runtime.yaml."""

    model: str
    mode: Literal["text", "vision"]
    prompts: str
    temperature: Rate
    max_tokens: Count


class Judge(Section):
    """Who says whether captions are true (`onediff judge`); asked where and for as much as the writer."""

    model: str
    prompts: str = "v1"
    temperature: Rate = 0.0
    max_tokens: Count = 60


class Retrieval(Section):
    """Which neighbours become a pair: cosine of CLIP embeddings, pairs per image."""

    min_similarity: Cosine
    max_similarity: Cosine
    max_uses: Count
    num_neighbors: Count

    @model_validator(mode="after")
    def _window(self) -> Self:
        if self.min_similarity >= self.max_similarity:
            raise ValueError(f"min_similarity {self.min_similarity} is not below max_similarity {self.max_similarity}")
        return self


class Diffusion(Section):
    """InstructPix2Pix: how images are edited, and which edits are kept (cosines of CLIP embeddings)."""

    pipeline: str
    image_px: Count
    steps: Count
    guidance: Rate
    image_guidance: Rate
    num_samples: Count
    min_image_similarity: Cosine
    min_caption_similarity: Cosine
    min_direction_similarity: Cosine


class Tolerance(Section):
    """Share of bad pairs above which validation stops the run."""

    generated: Share
    raw: Share


class Leaks(Section):
    """What becomes of training pairs that a later split holds too; max_distance: grey levels at which
    perceptual near-duplicates count as leaks, by source; null only reports them."""

    action: Literal["drop", "stop"]
    near_bits: Annotated[int, Field(ge=0, le=8)]
    max_distance: dict[str, Rate | None]


class Data(Section):
    generated: list[Literal["scenes", "edits"]]
    raw: list[SourceName]
    retrieved: list[SourceName]
    diffused: list[SourceName]
    written: list[SourceName]
    partial: list[SourceName]
    clip: str | None
    image_px: Annotated[int, Field(ge=32)]
    scenes: Scenes
    edits: Edits
    retrieval: Retrieval | None
    diffusion: Diffusion | None
    writer: Writer | None
    max_megapixels: Annotated[float, Field(gt=0)]
    tolerance: Tolerance
    leaks: Leaks
    shard_pairs: Count

    @model_validator(mode="after")
    def _each_source_once(self) -> Self:
        names = _sources(self)
        if not names:
            raise ValueError("no source: name one in generated, raw, retrieved or diffused")
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"source '{name}' is named twice in generated, raw, retrieved and diffused")
        for name in {"scenes", "scenes_far", "edits"} & {*self.raw, *self.retrieved, *self.diffused}:
            raise ValueError(f"'{name}' is a generated source: call your own otherwise")
        for key, allowed in (("written", names[len(self.generated):]), ("partial", self.raw)):
            for name in set(getattr(self, key)) - set(allowed):
                raise ValueError(f"{key} names '{name}', which must be one of {allowed}")
        return self

    @model_validator(mode="after")
    def _has_what_it_needs(self) -> Self:
        for name in (*self.retrieved, *self.diffused):
            if name not in self.written:
                raise ValueError(f"source '{name}' has no captions of its own: add it to written")
        for key, users in (("writer", (*self.written, *self.diffused)), ("retrieval", self.retrieved),
                           ("diffusion", self.diffused), ("clip", (*self.retrieved, *self.diffused))):
            if users and getattr(self, key) is None:
                raise ValueError(f"source '{users[0]}' needs {key}; see presets/paper.yaml")
        return self


def _sources(data: Data) -> list[str]:
    return [*data.generated, *data.raw, *data.retrieved, *data.diffused]


class Vision(Section):
    path: str
    image_px: Count
    patch_px: Count
    layers: Count

    @model_validator(mode="after")
    def _whole_patches(self) -> Self:
        if self.image_px % self.patch_px:
            low = self.image_px // self.patch_px * self.patch_px
            raise ValueError(f"image_px {self.image_px} is not a multiple of patch_px {self.patch_px}; "
                             f"nearest are {low} and {low + self.patch_px}")
        return self


class Delta(Section):
    """The Visual Delta Module; num_tokens 0: there is none, and the language model reads the patches alone."""

    num_tokens: Annotated[int, Field(ge=0)]
    width: Count
    heads: Count
    levels: Annotated[list[Count], Field(min_length=1)]
    cross_attention_every: Literal[1, 2]
    inputs: Literal["pair", "pair_and_difference", "pair_and_matched_difference"]
    image_ids: bool
    init: str

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        cross = len(self.levels)
        if self.levels != sorted(self.levels):
            raise ValueError(f"levels {self.levels} must not go down")
        if self.cross_attention_every == 2 and len(set(self.levels)) != cross:
            raise ValueError(f"levels {self.levels} repeat, but with cross_attention_every 2 each level is read once")
        return self


class Model(Section):
    vision: Vision
    language: str
    reading: Literal["A", "B", "C"]
    patch_level: int
    patch_pool: Count
    delta: Delta
    template: Literal["plain", "vicuna_v1"]
    max_length: Count
    precision: Literal["float32", "bfloat16"]

    @model_validator(mode="after")
    def _fits(self) -> Self:
        deepest = max(self.delta.levels)
        if deepest > self.vision.layers:
            raise ValueError(f"delta.levels reads level {deepest}, but vision.layers is {self.vision.layers}")
        if not -self.vision.layers - 1 <= self.patch_level <= self.vision.layers:
            raise ValueError(f"patch_level {self.patch_level} is outside the {self.vision.layers} layers of vision")
        side = self.vision.image_px // self.vision.patch_px
        if side % self.patch_pool:
            raise ValueError(f"patch_pool {self.patch_pool} does not divide the {side} patches of a row")
        if self.reading == "B" and (self.patch_pool != 1 or not self.delta.num_tokens):
            raise ValueError("reading B enhances every patch by the delta tokens: patch_pool must be 1, and "
                             "delta.num_tokens above 0")
        return self


class Lora(Section):
    """Low-rank adapters on every linear layer of the language model's blocks, which are then all that learns in it."""

    rank: Count
    alpha: Count


class Phase(Section):
    """One training phase. Learning rate 0 = frozen; exactly one of `steps` and `epochs` is set."""

    mixture: Annotated[dict[str, Annotated[float, Field(gt=0)]], Field(min_length=1)]
    steps: Count | None
    epochs: Annotated[float, Field(gt=0)] | None
    batch_size: Count
    lr_vision: Rate
    lr_delta: Rate
    lr_projector: Rate
    lr_language: Rate
    lora: Lora | None
    warmup: Share
    weight_decay: Rate
    clip_norm: Annotated[float, Field(gt=0)]
    mask_patches: Share
    validate_every: Count | None
    num_val: Count

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("set exactly one of steps and epochs, the other null")
        if not any((self.lr_vision, self.lr_delta, self.lr_projector, self.lr_language)):
            raise ValueError("every learning rate is 0: nothing would learn")
        if self.lora and not self.lr_language:
            raise ValueError("lora adapts the language model, but lr_language is 0: raise it, or set lora to null")
        return self


class Align(Phase):
    """samples: coupled, two unlike images and both captions (Coupled Sample Training); single, each image alone."""

    samples: Literal["coupled", "single"]


class Task(Section):
    """How a source is asked and answered, in training and as a benchmark; null: as its records and `caption` say.

    targets: drawn, one reference at each visit of a pair; each, every reference a sample; joined, all in one answer.
    """

    instruction: str | None
    targets: Literal["drawn", "each", "joined"]
    max_new_tokens: Count | None
    num_beams: Count | None


class Caption(Section):
    max_new_tokens: Count
    num_beams: Count
    batch_size: Count


class Stress(Section):
    """How the caption is tried beyond the plain test pairs: on how many of each benchmark, under which strengths.

    Noise in grey levels; shift in percent of the side; scale and brightness in percent more or less. The undisturbed
    pair is always measured beside them.
    """

    num_pairs: Count
    jpeg_quality: list[Annotated[int, Field(ge=1, le=100)]]
    noise: list[Annotated[float, Field(gt=0)]]
    shift_percent: list[Annotated[float, Field(gt=0, lt=100)]]
    scale_percent: list[Annotated[float, Field(gt=-90, le=900)]]
    brightness_percent: list[Annotated[float, Field(ge=-100)]]

    @model_validator(mode="after")
    def _each_strength_once(self) -> Self:
        for key in ("jpeg_quality", "noise", "shift_percent", "scale_percent", "brightness_percent"):
            strengths = getattr(self, key)
            if 0 in strengths or len(set(strengths)) < len(strengths):
                raise ValueError(f"{key} {strengths} must hold each strength once, and no 0: it is always measured")
        return self


class Drift(Section):
    """When use counts as unlike training (`onediff drift`): a figure must move by more than its threshold and by more
    than chance explains. `chance`: how often a check may cry wolf, over all its figures.

    Distances of distributions are Kolmogorov and Smirnov's, 0 (the same) to 1; rates move in parts of 1.
    """

    num_pairs: Count
    min_pairs: Annotated[int, Field(ge=10)]
    max_distance: Annotated[float, Field(gt=0, lt=1)]
    max_rate_change: Annotated[float, Field(gt=0, lt=1)]
    chance: Annotated[float, Field(gt=0, lt=1)]


class Config(Section):
    seed: Annotated[int, Field(ge=0)]
    data: Data
    model: Model
    tasks: dict[SourceName, Task]
    align: Align | None  # None: `tune` starts from the checkpoints as they are
    tune: Phase
    caption: Caption
    stress: Stress
    drift: Drift | None = None  # None: `onediff drift` has no thresholds, and says so
    judge: Judge | None = None  # None: `onediff judge` is told its model, or there is none

    @model_validator(mode="after")
    def _names_are_sources(self) -> Self:
        """One line for each wrong name, so that one run shows all of them."""
        sources = _sources(self.data)
        named: dict[str, Iterable[str]] = {
            "data.leaks.max_distance": self.data.leaks.max_distance, "tasks": self.tasks,
            "align.mixture": self.align.mixture if self.align else (), "tune.mixture": self.tune.mixture}
        lines = [f"{key}: '{name}' is not one of the sources {', '.join(sources)}; {_cure(name, sources)}"
                 for key, names in named.items() for name in names
                 if name not in sources and (key, name) != ("tasks", "scenes_far")]
        if lines:
            raise ValueError("\n".join(lines))
        return self


def _cure(name: str, sources: list[str]) -> str:
    near = difflib.get_close_matches(name, sources, 1)
    return f"did you mean '{near[0]}'?" if near else "correct the name, or add the source to data"


class Slurm(Section):
    """What sbatch is asked for beside nodes and GPUs; `options` are further lines, such as --qos=long."""

    partition: str | None = None
    account: str | None = None
    time: str = "24:00:00"
    options: list[str] = []
    poll_s: Annotated[float, Field(gt=0)] = 15.0


class Pools(Section):
    """Names of Prefect work pools."""

    cpu: str = "onediff-cpu"
    gpu: str = "onediff-gpu"


class Services(Section):
    """Servers and workers that `make services` keeps on this machine, on 127.0.0.1 alone; `folder` holds all of it.

    database: auto, PostgreSQL where it is installed. What a folder began with, it stays with.
    """

    folder: str = ".onediff/services"
    database: Literal["auto", "postgresql", "sqlite"] = "auto"
    prefect_port: Port = 4200
    mlflow_port: Port = 5000
    postgres_port: Port = 5433  # Debian's own cluster has 5432
    start_s: Annotated[float, Field(gt=0)] = 180.0  # that a service may take until it answers


class Runtime(Section):
    """Where and how it runs; nothing here may change a result. Environment variables ONEDIFF_<KEY> win."""

    launcher: Literal["local", "deepspeed", "slurm"] = "local"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    workers: Annotated[int, Field(ge=0)] = 0  # 0: one per core
    loader_workers: Annotated[int, Field(ge=0)] | None = None  # None: none on a CPU, else the cores shared by the GPUs
    micro_batch_size: Count | None = None  # None: the whole batch at once
    nodes: Count = 1
    gpus: Count = 1  # of each node
    hostfile: str | None = None  # DeepSpeed's: a line `name slots=8` for each node
    node_rank: Annotated[int, Field(ge=0)] | None = None  # set: the launcher is started on every node, without ssh
    master_addr: str | None = None
    master_port: Count = 29500
    slurm: Slurm = Slurm()
    zero_level: Literal[0, 1, 2, 3] = 0
    offload: Literal["none", "optimizer", "all"] = "none"  # to the CPU's memory; all: weights too (ZeRO 3)
    checkpoint_activations: bool = False
    compile: bool = False
    feature_cache_gb: Annotated[float, Field(ge=0)] = 20.0  # of a frozen tower's features, on disk; above: none
    peak_tflops: Annotated[float, Field(gt=0)] | None = None  # of one GPU, for MFU; None: known for common ones
    checkpoint_every_s: Annotated[float, Field(gt=0)] = 20.0
    grace_s: Annotated[float, Field(gt=0)] = 10.0  # from an interrupt until a stage is killed
    scratch: str = ".onediff/scratch"
    mlflow_uri: str | None = None  # None: SQLite in .onediff
    pools: Pools | None = None  # Prefect's work pools, by what a stage needs; None: stages run where the flow does
    git_remote: str | None = None  # where the branches retrain/RUN are pushed to; None: they stay here
    register_by_reference_gb: Rate = 2.0  # a model folder above is not copied into MLflow: DVC keeps the weights
    services: Services = Services()
    notify: list[str] = []  # Prefect blocks that are told, such as custom-webhook/onediff
    usage_log: str | None = None  # folder in which each caption made in use is noted; None: nowhere
    usage_images: bool = False  # with the images themselves, which false alarms in use are measured on
    inbox: str | None = None  # folder whose sub-folders are batches of pairs for sources of your own
    engine: Literal["local", "ray"] = "local"
    ray_address: str | None = None  # None: a cluster of this machine alone
    writer_url: str | None = None  # an OpenAI-compatible endpoint; None: OpenAI's own
    writer_concurrency: Count = 8
    writer_requests_per_minute: Annotated[float, Field(gt=0)] | None = None
    writer_tokens_per_minute: Annotated[float, Field(gt=0)] | None = None
    writer_max_usd: Rate = 0.0
    writer_usd_per_million_input: Rate | None = None  # None: unknown, and nothing is asked
    writer_usd_per_million_output: Rate | None = None

    @model_validator(mode="after")
    def _offloads(self) -> Self:
        least = {"none": 0, "optimizer": 1, "all": 3}[self.offload]
        if self.zero_level < least:
            raise ValueError(f"offload '{self.offload}' needs zero_level {least} or more, got {self.zero_level}")
        return self

    @property
    def num_workers(self) -> int:
        return self.workers or len(os.sched_getaffinity(0))

    @property
    def num_ranks(self) -> int:
        """Processes that train together, one per GPU."""
        return 1 if self.launcher == "local" else self.nodes * self.gpus


def load_params(path: Path = Path("params.yaml")) -> Config:
    """Raises ValueError with one line per wrong value: where, rule, got, cure."""
    return _checked(Config, _read(path), path)


def load_runtime(path: Path = Path("runtime.yaml")) -> Runtime:
    """runtime.yaml if it is there, then ONEDIFF_* variables over it. Raises ValueError."""
    values = _read(path) if path.exists() else {}
    yaml = YAML(typ="safe")
    for key in Runtime.model_fields:
        text = os.environ.get(f"ONEDIFF_{key.upper()}")
        if text is not None:
            values[key] = yaml.load(text)
    return _checked(Runtime, values, path)


def _read(path: Path) -> dict[str, Any]:
    try:
        values = YAML(typ="safe").load(path.read_text(encoding="utf-8"))  # as DVC reads it: 1e-3 is a number
    except FileNotFoundError:
        raise FileNotFoundError(f"{path.absolute()} not found: run this in the project's folder, where 'onediff preset "
                                "tiny' writes it") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from None
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise ValueError(f"{path}{line}: not valid YAML: {getattr(error, 'problem', error)}") from None
    if values is None:  # comments alone, as in runtime.example.yaml
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path}: must be a mapping of sections, got {type(values).__name__}")
    return values


def _checked(kind: type[T], values: dict[str, Any], path: Path) -> T:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        lines = [_explain(kind, item, path) for item in error.errors()]
        raise ValueError("\n".join(lines)) from None


def _explain(kind: type[Section], item: Any, path: Path) -> str:
    """One pydantic error -> `params.yaml: align.lr_vison: unknown key; did you mean 'lr_vision'?`"""
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(item["loc"][-1]), _keys_at(kind, item["loc"][:-1]), 1)
        return f"{path}: {where}: unknown key" + (f"; did you mean '{near[0]}'?" if near else "; remove it")
    if item["type"] == "missing":
        return f"{path}: {where}: missing; see presets/ for a complete file"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":
        return "\n".join(f"{path}: {where + ': ' if where else ''}{line}" for line in message.split("\n"))
    return f"{path}: {where}: {message[0].lower() + message[1:]}, got {item['input']!r}"


def _keys_at(kind: type[Section], loc: tuple[int | str, ...]) -> list[str]:
    for part in loc:
        annotation = kind.model_fields[str(part)].annotation
        sections = [its for its in (annotation, *get_args(annotation))  # of one that may be null, too
                    if isinstance(its, type) and issubclass(its, Section)]
        if not sections:
            return []
        kind = sections[0]
    return list(kind.model_fields)
