"""The schema of params.yaml, which holds every setting that changes a result.

Each class is one section of the file, and each check rejects a wrong value before any work is done. The comments in
params.yaml explain the keys for users.

DVC tracks the values in params.yaml but not this module, so that a new key for one stage does not make other stages
stale. Therefore this module must not influence a result: a section that a stage reads has no default values and no
methods other than checks. tests/config/test_params.py enforces this rule.
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
    """A number of scenes or pairs for each split."""

    train: Count
    val: Count
    gate: Count
    test: Count


class Scenes(Section):
    """Rendered table tops: one base scene gives several pairs, and `jitter` scales how far camera and light move.

    `num_far` test scenes use `far_jitter` instead and form the benchmark scenes_far. `min_visible` is the share of the
    image that each object must cover.
    """

    renderer: Literal["raytracer", "blender"]
    num_scenes: SplitCounts
    num_far: Count
    jitter: Rate
    far_jitter: Rate
    min_objects: Annotated[int, Field(ge=2)]
    max_objects: Annotated[int, Field(le=8)]
    min_visible: Share

    @model_validator(mode="after")
    def _check_object_counts(self) -> Self:
        if self.min_objects > self.max_objects:
            raise ValueError(f"min_objects {self.min_objects} must not be above max_objects {self.max_objects}")
        return self


class Edits(Section):
    """Images that a program edits: rendered canvases (`canvas_share` of the pairs) and photographs (all others).

    `photos` is a folder of photographs; null uses the photographs that scikit-image and scikit-learn contain.
    """

    num_pairs: SplitCounts
    canvas_share: Share
    photos: str | None


class Writer(Section):
    """The language model that writes captions and edit instructions: the writer.

    runtime.yaml holds the address and the prices of its endpoint, because they do not change a result.
    """

    model: str
    mode: Literal["text", "vision"]
    prompts: str
    temperature: Rate
    max_tokens: Count


class Judge(Section):
    """The language model that rates captions as true or false (`onediff judge`). It uses the endpoint of the writer."""

    model: str
    prompts: str = "v1"
    temperature: Rate = 0.0
    max_tokens: Count = 60


class Retrieval(Section):
    """The limits on the cosine similarity of CLIP embeddings with which two images of a collection become a pair.

    An image is compared with its `num_neighbors` nearest images, and is used in at most `max_uses` pairs.
    """

    min_similarity: Cosine
    max_similarity: Cosine
    max_uses: Count
    num_neighbors: Count

    @model_validator(mode="after")
    def _check_similarities(self) -> Self:
        if self.min_similarity >= self.max_similarity:
            raise ValueError(f"min_similarity {self.min_similarity} must be below max_similarity {self.max_similarity}")
        return self


class Diffusion(Section):
    """The settings with which InstructPix2Pix edits images, and the rules by which an edit is kept.

    `num_samples` edits are made per image. An edit is kept if each cosine similarity of CLIP embeddings reaches its
    minimum: between the two images, between each image and its caption, and between the change of the images and the
    change of the captions.
    """

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
    """The highest share of bad pairs, from 0 to 1, with which validation lets the run continue."""

    generated: Share
    raw: Share


class Leaks(Section):
    """The treatment of leaks: pairs whose images also occur in a later split (in the order train, val, gate, test).

    `near_bits` is the number of bits in which two perceptual hashes may differ to count as near-duplicates.
    `max_distance` maps a source to the mean pixel difference, in grey levels, up to which a near-duplicate is a leak.
    For null it is only reported.
    """

    action: Literal["drop", "stop"]
    near_bits: Annotated[int, Field(ge=0, le=8)]
    max_distance: dict[str, Rate | None]


class Data(Section):
    """The sources of image pairs, and how pairs are generated, checked and stored.

    `generated`, `raw`, `retrieved` and `diffused` list the sources by the way they are made. `written` lists sources
    whose captions the writer writes, and `partial` lists raw sources of which images may be missing.
    """

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
    def _check_source_names(self) -> Self:
        names = _sources(self)
        if not names:
            raise ValueError("there must be at least one source, got none; add one to generated, raw, retrieved or "
                             "diffused")
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"source '{name}' must occur only once in generated, raw, retrieved and diffused; "
                                 "remove the others")
        for name in sorted({"scenes", "scenes_far", "edits"} & {*self.raw, *self.retrieved, *self.diffused}):
            raise ValueError(f"'{name}' is the name of a generated source; give your source another name")
        for key, allowed in (("written", [*self.raw, *self.retrieved, *self.diffused]), ("partial", self.raw)):
            for name in sorted(set(getattr(self, key)) - set(allowed)):
                raise ValueError(f"{key} lists '{name}', but only these sources are allowed there: {allowed}")
        return self

    @model_validator(mode="after")
    def _check_requirements(self) -> Self:
        for name in (*self.retrieved, *self.diffused):
            if name not in self.written:
                raise ValueError(f"source '{name}' has no captions for its pairs; add it to written")
        for key, users in (("writer", (*self.written, *self.diffused)), ("retrieval", self.retrieved),
                           ("diffusion", self.diffused), ("clip", (*self.retrieved, *self.diffused))):
            if users and getattr(self, key) is None:
                raise ValueError(f"source '{users[0]}' needs the key {key}, which is null; see presets/paper.yaml for "
                                 "an example")
        return self


def _sources(data: Data) -> list[str]:
    """Return the names of all sources, in the order of the keys that list them."""
    return [*data.generated, *data.raw, *data.retrieved, *data.diffused]


class Vision(Section):
    """The vision tower. Image size, patch size and number of layers must be those of the model at `path`."""

    path: str
    image_px: Count
    patch_px: Count
    layers: Count

    @model_validator(mode="after")
    def _check_patch_size(self) -> Self:
        if self.image_px % self.patch_px:
            low = self.image_px // self.patch_px * self.patch_px
            raise ValueError(f"image_px {self.image_px} is not a multiple of patch_px {self.patch_px}; "
                             f"nearest are {low} and {low + self.patch_px}")
        return self


class Delta(Section):
    """The Visual Delta Module. If `num_tokens` is 0, the model has none and the language model reads only patches.

    `levels` lists the hidden states of the vision tower that the cross-attentions read, one entry for each.
    """

    num_tokens: Annotated[int, Field(ge=0)]
    width: Count
    heads: Count
    levels: Annotated[list[Count], Field(min_length=1)]
    cross_attention_every: Literal[1, 2]
    inputs: Literal["pair", "pair_and_difference", "pair_and_matched_difference"]
    image_ids: bool
    init: str

    @model_validator(mode="after")
    def _check_width_and_levels(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.levels != sorted(self.levels):
            raise ValueError(f"levels {self.levels} must be sorted in ascending order")
        if self.cross_attention_every == 2 and len(set(self.levels)) != len(self.levels):
            raise ValueError(f"levels {self.levels} must not repeat a level if cross_attention_every is 2")
        return self


class Model(Section):
    """The architecture: vision tower, Visual Delta Module, language model, and the token layout `reading` (A, B or C).

    onediff/model/onediff.py explains the token layouts. `patch_level` is the hidden state of the vision tower whose
    patches the language model reads, and `patch_pool` is the side of the squares of patches that are averaged.
    """

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
    def _check_levels_and_layout(self) -> Self:
        deepest = max(self.delta.levels)
        if deepest > self.vision.layers:
            raise ValueError(f"delta.levels must not exceed vision.layers {self.vision.layers}, got {deepest}")
        if not -self.vision.layers - 1 <= self.patch_level <= self.vision.layers:
            raise ValueError(f"patch_level must be from {-self.vision.layers - 1} to {self.vision.layers} (0 is the "
                             f"input of the first layer, -1 the output of the last), got {self.patch_level}")
        side = self.vision.image_px // self.vision.patch_px
        if side % self.patch_pool:
            raise ValueError(f"patch_pool {self.patch_pool} must divide the number of patches per row, which is {side}")
        if self.reading == "B" and (self.patch_pool != 1 or not self.delta.num_tokens):
            raise ValueError("reading B lets every patch attend to the delta tokens, so patch_pool must be 1 and "
                             f"delta.num_tokens above 0, got {self.patch_pool} and {self.delta.num_tokens}")
        return self


class Lora(Section):
    """Low-rank adapters for the linear layers in the blocks of the language model; only the adapters are trained."""

    rank: Count
    alpha: Count


class Phase(Section):
    """A training phase. A learning rate of 0 freezes the part of the model that it belongs to.

    `mixture` maps sources to sampling weights. Exactly one of `steps` and `epochs` is set. `warmup` is a share of the
    steps. `mask_patches` is the share of rows whose patch tokens are hidden from the language model. Every
    `validate_every` steps the model is scored on `num_val` pairs of the `val` split; null disables this.
    """

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
    def _check_length_and_rates(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("set exactly one of steps and epochs to a number, and the other to null")
        if not any((self.lr_vision, self.lr_delta, self.lr_projector, self.lr_language)):
            raise ValueError("at least one learning rate must be above 0, or nothing is trained")
        if self.lora and not self.lr_language:
            raise ValueError("lora needs an lr_language above 0, got 0; set lr_language above 0, or lora to null")
        return self


class Align(Phase):
    """The first phase, which aligns visual tokens with the language model by captions of single images.

    `samples` is "coupled" for Coupled Sample Training, where a row has two unrelated images and both captions, or
    "single" for one image and one caption per row.
    """

    samples: Literal["coupled", "single"]


class Task(Section):
    """The instruction and the answer format of one source, in training and in evaluation.

    If a key is null, the instruction of the record or the value of the section `caption` applies.
    `targets` is "drawn" to train on one random reference at each visit of a pair, "each" to make every reference a
    sample, or "joined" to put all references of a pair into one answer.
    """

    instruction: str | None
    targets: Literal["drawn", "each", "joined"]
    max_new_tokens: Count | None
    num_beams: Count | None


class Caption(Section):
    """The settings of caption generation: greedy decoding if `num_beams` is 1, and beam search otherwise."""

    max_new_tokens: Count
    num_beams: Count
    batch_size: Count


class Stress(Section):
    """The stress test: `num_pairs` test pairs of each benchmark are captioned under perturbations of each strength.

    Noise is in grey levels, shift in percent of the image side, and scale and brightness are changes in percent. The
    unperturbed pairs are always measured too, so no list contains 0.
    """

    num_pairs: Count
    jpeg_quality: list[Annotated[int, Field(ge=1, le=100)]]
    noise: list[Annotated[float, Field(gt=0)]]
    shift_percent: list[Annotated[float, Field(gt=0, lt=100)]]
    scale_percent: list[Annotated[float, Field(gt=-90, le=900)]]
    brightness_percent: list[Annotated[float, Field(ge=-100)]]

    @model_validator(mode="after")
    def _check_strengths(self) -> Self:
        for key in ("jpeg_quality", "noise", "shift_percent", "scale_percent", "brightness_percent"):
            strengths = getattr(self, key)
            if 0 in strengths or len(set(strengths)) < len(strengths):
                raise ValueError(f"{key} {strengths} must list each strength once, without 0, which is always measured")
        return self


class Drift(Section):
    """The thresholds of `onediff drift`, which compares the images and captions in use with those of training.

    A figure has drifted if it changed significantly and by more than the threshold. `chance` is the probability
    of a false report over all figures of one check.
    `max_distance` is the Kolmogorov-Smirnov distance of two distributions, from 0 (equal) to 1. `max_rate_change` is
    the difference of two rates from 0 to 1.
    """

    num_pairs: Count
    min_pairs: Annotated[int, Field(ge=10)]
    max_distance: Annotated[float, Field(gt=0, lt=1)]
    max_rate_change: Annotated[float, Field(gt=0, lt=1)]
    chance: Annotated[float, Field(gt=0, lt=1)]


class Config(Section):
    """The complete params.yaml: data, model, the two training phases, and the evaluation."""

    seed: Annotated[int, Field(ge=0)]
    data: Data
    model: Model
    tasks: dict[SourceName, Task]
    align: Align | None  # If this section is missing, `tune` starts from the pretrained models.
    tune: Phase
    caption: Caption
    stress: Stress
    drift: Drift | None = None  # If this section is missing, `onediff drift` stops, because it has no thresholds.
    judge: Judge | None = None  # If this section is missing, `onediff judge` needs the option --model.

    @model_validator(mode="after")
    def _check_names_of_sources(self) -> Self:
        """Raise ValueError with one line for each unknown source name, so that all wrong names are shown at once."""
        sources = _sources(self.data)
        names_at: dict[str, Iterable[str]] = {
            "data.leaks.max_distance": self.data.leaks.max_distance, "tasks": self.tasks,
            "align.mixture": self.align.mixture if self.align else (), "tune.mixture": self.tune.mixture}
        lines = [f"{key}: '{name}' is not one of the sources {', '.join(sources)}; "
                 + did_you_mean(name, sources, "correct the name, or add the source to the section data")
                 for key, names in names_at.items() for name in names
                 if name not in sources and (key, name) != ("tasks", "scenes_far")]
        if lines:
            raise ValueError("\n".join(lines))
        return self


def load_params(path: Path = PARAMS) -> Config:
    """Read and check params.yaml. Raises ValueError with one line for each wrong value."""
    return checked(Config, read_yaml(path), path)
