"""The section `data` of params.yaml: the sources of image pairs, and how pairs are generated, checked and stored."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from onediff.config.reading import Count, Rate, Section, Share, SourceName

Cosine = Annotated[float, Field(ge=-1, le=1)]
Gains = Annotated[list[Rate], Field(min_length=2, max_length=2)]  # the lowest and the highest gain


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
        names = source_names(self)
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


def source_names(data: Data) -> list[str]:
    """Return the names of all sources: first generated, then raw, retrieved and diffused sources."""
    return [*data.generated, *data.raw, *data.retrieved, *data.diffused]
