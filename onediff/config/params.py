"""params.yaml as frozen, checked objects: everything that changes a result.

DVC tracks the values in params.yaml, not this file: a new key of one stage must not make the other stages stale. So
nothing here may decide a result: sections that a stage reads have no defaults, and no methods other than checks
(tests/config/test_params.py).
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from onediff.config.reading import Count, Rate, Section, checked, did_you_mean, read_yaml
from onediff.paths import PARAMS

Share = Annotated[float, Field(ge=0, le=1)]
Cosine = Annotated[float, Field(ge=-1, le=1)]
SourceName = Annotated[str, Field(pattern="^[a-z][a-z0-9_]*$")]


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
        if self.levels != sorted(self.levels):
            raise ValueError(f"levels {self.levels} must not go down")
        if self.cross_attention_every == 2 and len(set(self.levels)) != len(self.levels):
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
    judge: Judge | None = None  # None: `onediff judge` needs --model

    @model_validator(mode="after")
    def _names_are_sources(self) -> Self:
        """One line for each wrong name, so that one run shows all of them."""
        sources = _sources(self.data)
        names_at: dict[str, Iterable[str]] = {
            "data.leaks.max_distance": self.data.leaks.max_distance, "tasks": self.tasks,
            "align.mixture": self.align.mixture if self.align else (), "tune.mixture": self.tune.mixture}
        lines = [f"{key}: '{name}' is not one of the sources {', '.join(sources)}; "
                 + did_you_mean(name, sources, "correct the name, or add the source to data")
                 for key, names in names_at.items() for name in names
                 if name not in sources and (key, name) != ("tasks", "scenes_far")]
        if lines:
            raise ValueError("\n".join(lines))
        return self


def load_params(path: Path = PARAMS) -> Config:
    """Raises ValueError with one line per wrong value: where, rule, got, cure."""
    return checked(Config, read_yaml(path), path)
