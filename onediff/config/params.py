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
Gains = Annotated[list[Rate], Field(min_length=2, max_length=2)]  # the lowest and the highest gain
SourceName = Annotated[str, Field(pattern="^[a-z][a-z0-9_]*$")]


class SplitCounts(Section):
    """The number of scenes or image pairs in each split."""

    train: Count
    val: Count
    gate: Count
    test: Count


class Scenes(Section):
    """The settings of the source `scenes`: rendered images of objects on a table, with several pairs per scene.

    `jitter` scales the random distance of camera and light from their default positions. In the split `train`, it is
    drawn for each scene, up to `train_jitter`. The benchmark scenes_far has `num_far` test scenes with `far_jitter`
    instead. `min_visible` is the share of the image that each object must cover.
    """

    renderer: Literal["raytracer", "blender"]
    num_scenes: SplitCounts
    num_far: Count
    train_jitter: Rate
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


class Shares(Section):
    """The shares of the pairs of `edits` that are made from photographs, generated pictures and canvases."""

    photograph: Share
    generated: Share
    canvas: Share

    @model_validator(mode="after")
    def _check_sum(self) -> Self:
        total = self.photograph + self.generated + self.canvas
        if abs(total - 1) > 1e-6:
            raise ValueError(f"the shares of photograph, generated and canvas must add up to 1, got {total:g}")
        return self


class Edits(Section):
    """The settings of the source `edits`: images that a program edits.

    In the splits other than `train`, each of the `num_pairs` pairs is followed by its swapped pair. `photos` is a
    folder of photographs; null selects the photographs that Python packages contain.
    """

    num_pairs: SplitCounts
    shares: Shares
    photos: str | None


class Nuisance(Section):
    """The disturbances of images that are no change, and the limits from which light and blur are edits.

    `share` is the share of pairs that are disturbed, and `heldout_strength` is the strength in val, gate and test,
    relative to train. `noise` is a standard deviation in grey levels. `light` and `edit_light` are the darkest and the
    brightest gain. Lengths are in pixels of the stored images.
    """

    share: Share
    heldout_strength: Share
    light: Gains
    blur_px: Rate
    shift_px: Rate
    resampling: Annotated[float, Field(gt=0, le=1)]
    noise: Rate
    jpeg_quality: Annotated[int, Field(ge=1, le=95)]
    edit_light: Gains
    edit_blur_px: Rate

    @model_validator(mode="after")
    def _check_margins(self) -> Self:
        if not self.edit_light[0] < self.light[0] <= 1 <= self.light[1] < self.edit_light[1]:
            raise ValueError(f"light {self.light} must contain 1 and be inside edit_light {self.edit_light}")
        if self.blur_px >= self.edit_blur_px:
            raise ValueError(f"blur_px {self.blur_px} must be below edit_blur_px {self.edit_blur_px}")
        return self


class Writer(Section):
    """The settings of the writer, the language model that writes captions and edit instructions.

    The address and the prices of the writer's endpoint are in runtime.yaml, because they do not change a result.
    """

    model: str
    mode: Literal["text", "vision"]
    prompts: str
    temperature: Rate
    max_tokens: Count


class Judge(Section):
    """The settings of the language model with which `onediff judge` rates each caption as true or false."""

    model: str
    prompts: str = "v1"
    temperature: Rate = 0.0
    max_tokens: Count = 60


class Retrieval(Section):
    """The settings of retrieval, which makes pairs of similar images from a collection of single images.

    Two images become a pair if the cosine similarity of their CLIP embeddings is between the two limits. An image is
    compared with its `num_neighbors` nearest images, and is used in at most `max_uses` pairs.
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

    InstructPix2Pix makes `num_samples` edits per image. An edit is kept if three cosine similarities of CLIP embeddings
    reach their minimum: between the two images, between each image and its caption, and between the difference of the
    images and the difference of the captions.
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
    """The share of bad image pairs, from 0 to 1, up to which the stage `validate` does not stop the pipeline."""

    generated: Share
    raw: Share


class Leaks(Section):
    """The treatment of leaks: pairs whose images also occur in a later split (in the order train, val, gate, test).

    Two images are near-duplicates if their perceptual hashes differ in at most `near_bits` bits. `max_distance` maps a
    source to the mean pixel difference, in grey levels, up to which near-duplicates are leaks. If it maps a source to
    null, near-duplicates of this source are only reported.
    """

    action: Literal["drop", "stop"]
    near_bits: Annotated[int, Field(ge=0, le=8)]
    max_distance: dict[str, Rate | None]


class Data(Section):
    """The sources of image pairs, and how pairs are generated, checked and stored.

    `generated`, `raw`, `retrieved` and `diffused` list the sources by how their pairs are made. `written` lists the
    sources whose captions a language model writes. `partial` lists the raw sources that may lack some images.
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
    nuisance: Nuisance
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
                                 "remove the other entries")
        for name in sorted({"scenes", "scenes_far", "edits"} & {*self.raw, *self.retrieved, *self.diffused}):
            raise ValueError(f"'{name}' is the name of a source that OneDiff generates; give your source another name")
        for key, allowed in (("written", [*self.raw, *self.retrieved, *self.diffused]), ("partial", self.raw)):
            for name in sorted(set(getattr(self, key)) - set(allowed)):
                raise ValueError(f"{key} lists '{name}', but only these sources are allowed there: {allowed}")
        return self

    @model_validator(mode="after")
    def _check_requirements(self) -> Self:
        for name in (*self.retrieved, *self.diffused):
            if name not in self.written:
                raise ValueError(f"the pairs of source '{name}' have no captions; add the source to the list written")
        for key, users in (("writer", (*self.written, *self.diffused)), ("retrieval", self.retrieved),
                           ("diffusion", self.diffused), ("clip", (*self.retrieved, *self.diffused))):
            if users and getattr(self, key) is None:
                raise ValueError(f"source '{users[0]}' needs the key {key}, which is null; see presets/paper.yaml for "
                                 "an example")
        return self


def _sources(data: Data) -> list[str]:
    """Return the names of all sources: first generated, then raw, retrieved and diffused sources."""
    return [*data.generated, *data.raw, *data.retrieved, *data.diffused]


class Vision(Section):
    """The pretrained vision tower. The other keys must equal the values in the config.json of the model at `path`."""

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


class Fusion(Section):
    """The sizes of the module Fusion, which compares the pixels of both images.

    `channels` is the width of the trainable stem, whose map has one cell for 4 x 4 pixels. `places` is the number of
    places per side on which the images are compared, and `width` is the width of the joined map, on which `blocks`
    convolutions run.
    """

    channels: Count
    width: Count
    places: Count
    blocks: Count


class Delta(Section):
    """The settings of the Visual Delta Module. If `num_tokens` is 0, the model is built without this module.

    `levels` has one entry for each cross-attention: the index of the hidden state of the vision tower that it reads.
    If `fusion` is null, the module reads only patches of the vision tower, as in the paper.
    """

    num_tokens: Annotated[int, Field(ge=0)]
    width: Count
    heads: Count
    levels: Annotated[list[Count], Field(min_length=1)]
    cross_attention_every: Literal[1, 2]
    inputs: Literal["pair", "pair_and_difference", "pair_and_matched_difference"]
    image_ids: bool
    fusion: Fusion | None
    init: str

    @model_validator(mode="after")
    def _check_width_and_levels(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.levels != sorted(self.levels):
            raise ValueError(f"levels {self.levels} must be sorted in ascending order")
        if self.cross_attention_every == 2 and len(set(self.levels)) != len(self.levels):
            raise ValueError(f"levels {self.levels} must not repeat a level if cross_attention_every is 2")
        if self.fusion and not self.num_tokens:
            raise ValueError("fusion needs delta tokens, so num_tokens must be above 0, got 0; set fusion to null, or "
                             "num_tokens above 0")
        return self


class Model(Section):
    """The architecture of the model: vision tower, Visual Delta Module, language model, and token layout `reading`.

    onediff/model/onediff.py explains the token layouts A, B and C. `patch_level` is the index of the hidden state of
    the vision tower that gives the patches for the language model. `patch_pool` is the side, in patches, of the squares
    of patches that are averaged into one patch token.
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
            raise ValueError("in token layout B (reading: B) every patch attends to the delta tokens, so patch_pool "
                             "must be 1 and delta.num_tokens must be above 0, got patch_pool "
                             f"{self.patch_pool} and delta.num_tokens {self.delta.num_tokens}")
        return self

    @model_validator(mode="after")
    def _check_fusion(self) -> Self:
        fusion = self.delta.fusion
        if fusion and self.reading == "B":
            raise ValueError("in token layout B (reading: B) the language model reads no delta tokens, but those of "
                             "delta.fusion must be read; set delta.fusion to null, or reading to A or C")
        if fusion and (self.vision.image_px % 4 or self.vision.image_px // 4 % fusion.places):
            raise ValueError(f"delta.fusion.places must divide the {self.vision.image_px} / 4 cells per side of the "
                             f"stem's map, got {fusion.places}")
        cells = self.vision.image_px // 4
        if fusion and cells > 3 * fusion.places:
            # The convolution from cells to places has a width of 3 cells.
            raise ValueError(f"delta.fusion.places must be at least {-(-cells // 3)}, because each place sees 3 of the "
                             f"{cells} cells per side and would skip cells otherwise, got {fusion.places}")
        return self


class Lora(Section):
    """Low-rank adapters (LoRA) for the linear layers of the language model, whose other weights are then frozen."""

    rank: Count
    alpha: Count


class Phase(Section):
    """The settings of a training phase. A learning rate of 0 freezes the part of the model that it belongs to.

    `mixture` maps sources to sampling weights. Exactly one of `steps` and `epochs` is set. `warmup` is the share of the
    steps in which the learning rate rises. `mask_patches` is the share of training rows whose patch tokens are hidden
    from the language model. Every `validate_every` steps the model is scored on `num_val` pairs of the `val` split;
    null disables these scores.
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
            raise ValueError("set exactly one of the keys steps and epochs to a number, and the other key to null")
        if not any((self.lr_vision, self.lr_delta, self.lr_projector, self.lr_language)):
            raise ValueError("at least one learning rate must be above 0, because 0 freezes a part of the model")
        if self.lora and not self.lr_language:
            raise ValueError("lora trains the language model, so lr_language must be above 0, got 0; set lr_language "
                             "above 0, or set lora to null")
        return self


class Align(Phase):
    """The settings of the first training phase, in which the model learns from captions of single images.

    If `samples` is "coupled" (Coupled Sample Training), a training row has two unrelated images and both captions. If
    it is "single", a row has one image and one caption.
    """

    samples: Literal["coupled", "single"]


class Auxiliary(Section):
    """The weights of the auxiliary losses of Fusion beside the loss of the caption.

    `place` trains where the change is, `changed` whether something changed, and `object` the attributes of the changed
    object. Only pairs whose records state these facts count.
    """

    place: Rate
    changed: Rate
    object: Rate


class Tune(Phase):
    """The settings of the second training phase, multi-task instruction tuning.

    `default_question` is the share of image pairs that are trained with the default question of `onediff caption`. The
    other pairs are trained with the instruction of their source or record. Conversations keep their own questions.
    If `auxiliary` is null, only the loss of the caption is used.
    """

    default_question: Share
    auxiliary: Auxiliary | None


class Task(Section):
    """The instruction and the answer format of one source, in training and in evaluation.

    If `instruction` is null, training also uses each record's own instruction, and evaluation asks the default question
    of `onediff caption`; if another key is null, the section `caption` gives the value. `targets` decides on which
    references of a pair the model is trained: "drawn" draws one reference each time, "each" makes one sample per
    reference, and "joined" joins all references into one answer.
    """

    instruction: str | None
    targets: Literal["drawn", "each", "joined"]
    max_new_tokens: Count | None
    num_beams: Count | None


class Caption(Section):
    """The settings of caption generation: greedy decoding if `num_beams` is 1, and beam search otherwise.

    `num_paraphrased` is the number of test pairs of each generated benchmark that are also captioned with every
    paraphrase of the default question; with 0, this is not measured.
    """

    max_new_tokens: Count
    num_beams: Count
    batch_size: Count
    num_paraphrased: Annotated[int, Field(ge=0)]


class Stress(Section):
    """The settings of the stress test, in which the model captions `num_pairs` perturbed test pairs per benchmark.

    Each list holds the strengths of one perturbation. Noise is in grey levels, shift is in percent of the image side,
    and scale and brightness are changes in percent. No list contains 0, because unperturbed pairs are always captioned.
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
                raise ValueError(f"{key} {strengths} must list each strength once, and must not list 0, because pairs "
                                 "without a perturbation are always measured")
        return self


class Drift(Section):
    """The thresholds of `onediff drift`, which compares recent images and captions with those of the `gate` split.

    A figure has drifted if its change is statistically significant and larger than the threshold. `chance` is the
    highest probability that one check reports a drift by chance. `max_distance` is the threshold for the
    Kolmogorov-Smirnov distance of two distributions, from 0 (equal) to 1. `max_rate_change` is the threshold for the
    difference of two rates, such as the shares of captions that report no change.
    """

    num_pairs: Count
    min_pairs: Annotated[int, Field(ge=10)]
    max_distance: Annotated[float, Field(gt=0, lt=1)]
    max_rate_change: Annotated[float, Field(gt=0, lt=1)]
    chance: Annotated[float, Field(gt=0, lt=1)]


class Config(Section):
    """All settings of params.yaml: data, model, the two training phases, and the evaluation."""

    seed: Annotated[int, Field(ge=0)]
    data: Data
    model: Model
    tasks: dict[SourceName, Task]
    align: Align | None  # If this section is null, the phase `tune` starts from the pretrained models.
    tune: Tune
    caption: Caption
    stress: Stress
    drift: Drift | None = None  # If this section is missing, `onediff drift` stops, because it has no thresholds.
    judge: Judge | None = None  # If this section is missing, `onediff judge` needs the option --model.

    @model_validator(mode="after")
    def _check_auxiliary_losses(self) -> Self:
        if self.tune.auxiliary and not self.model.delta.fusion:
            raise ValueError("tune.auxiliary: the auxiliary losses train the module Fusion, but model.delta.fusion is "
                             "null; set tune.auxiliary to null, or configure model.delta.fusion")
        return self

    @model_validator(mode="after")
    def _check_names_of_sources(self) -> Self:
        """Raise ValueError if a section names an unknown source. The message has one line for each wrong name."""
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
    """Read and check params.yaml. Raises ValueError whose message has one line for each wrong value."""
    return checked(Config, read_yaml(path), path)
