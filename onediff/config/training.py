"""The sections `model`, `tasks`, `align` and `tune` of params.yaml: the architecture and the two training phases."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from onediff.config.reading import Count, Rate, Section, Share


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


class WeightDecay(Section):
    """The weight decay of each part of the model. It applies to matrices, but not to biases and normalizations."""

    vision: Rate
    delta: Rate
    projector: Rate
    language: Rate


class Phase(Section):
    """The settings of a training phase. A learning rate of 0 freezes the part of the model that it belongs to.

    `mixture` maps sources to the rows that an epoch has, in thousands. Exactly one of `steps` and `epochs` is set; with
    `steps`, only the ratios of the mixture matter. `lr_inherited` is the rate of the weights of the delta module that
    come from BERT; with null, they have the rate `lr_delta` of the other weights of this module. `warmup` is the share
    of the steps in which the learning rate rises. `loss` says which unit counts equally in the loss of a step: every
    answer token, or every sample, whose loss is then the mean over its answer tokens. `mask_patches` is the share of
    training rows whose patch tokens are hidden from the language model. Every `validate_every` steps the model is
    scored on `num_val` pairs of the `val` split; null disables these scores.
    """

    mixture: Annotated[dict[str, Annotated[float, Field(gt=0)]], Field(min_length=1)]
    steps: Count | None
    epochs: Annotated[float, Field(gt=0)] | None
    batch_size: Count
    lr_vision: Rate
    lr_delta: Rate
    lr_inherited: Rate | None
    lr_projector: Rate
    lr_language: Rate
    lora: Lora | None
    warmup: Share
    weight_decay: WeightDecay
    clip_norm: Annotated[float, Field(gt=0)]
    loss: Literal["tokens", "samples"]
    mask_patches: Share
    validate_every: Count | None
    num_val: Count

    @model_validator(mode="after")
    def _check_length_and_rates(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("set exactly one of the keys steps and epochs to a number, and the other key to null")
        if not any((self.lr_vision, self.lr_delta, self.lr_projector, self.lr_language)):
            raise ValueError("at least one learning rate must be above 0, because 0 freezes a part of the model")
        if self.lr_inherited is not None and not self.lr_delta:
            raise ValueError("lr_inherited must be null if lr_delta is 0, because then the complete delta module is "
                             f"frozen, got {self.lr_inherited:g}; set lr_delta above 0, or lr_inherited to null")
        if self.lora and not self.lr_language:
            raise ValueError("lora trains the language model, so lr_language must be above 0, got 0; set lr_language "
                             "above 0, or set lora to null")
        return self


class Align(Phase):
    """The settings of the first training phase, in which the model learns from captions of single images.

    If `samples` is "coupled" (Coupled Sample Training), a training row has two unrelated images and both captions. If
    it is "single", a row has one image and one caption. If `replacement` is true, each row draws from all images of its
    source; otherwise every image occurs once before any image occurs again.
    """

    samples: Literal["coupled", "single"]
    replacement: bool


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
