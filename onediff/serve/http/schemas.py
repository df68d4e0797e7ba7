"""The JSON bodies of `POST /v1/captions`: what a client sends, and what the server answers."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Grid = list[list[float]]
LONGEST_INSTRUCTION = 2000  # characters; a model usually takes fewer, because it counts tokens


class PairRequest(BaseModel):
    """A pair of images, each as base64 text or as a data URI, and what to do with it."""

    model_config = ConfigDict(extra="forbid")

    before: Annotated[str, Field(description="The image before the change: base64 text or a data URI.",
                                json_schema_extra={"format": "byte"})]
    after: Annotated[str, Field(description="The image after the change: base64 text or a data URI.",
                                json_schema_extra={"format": "byte"})]
    instruction: Annotated[str | None, Field(description="The question to the model; null asks what changed.",
                                             max_length=LONGEST_INSTRUCTION)] = None
    heat_map: Annotated[bool, Field(description="Also answer where the delta tokens of the model look.")] = False


class ServedModel(BaseModel):
    """The registered version, or the name of the model folder, that wrote a caption, and the SHA-256 of its files."""

    version: str
    digest: str


class HeatMap(BaseModel):
    """The attention of the delta tokens on each place of both images, from 0 to 1, as rows of a grid.

    The model pads an image to a square, with the image in the middle, and each grid covers this square.
    """

    before: Grid
    after: Grid


class CaptionAnswer(BaseModel):
    """What changed between the images of one pair. A value that the model cannot give is null.

    `confidence` is the geometric mean of the probabilities of the caption's tokens. `regions` lists the changed boxes
    of `before` and of `after`, each as left, top, right and bottom edge, in shares of the width and of the height.
    `familiar` is false if the images differ from those with which the model was trained. `milliseconds` is the time
    from the first byte of the request to the answer.
    """

    caption: str
    changed: bool | None
    confidence: float | None
    regions: dict[str, Grid] | None
    familiar: bool | None
    heat_map: HeatMap | None = None
    model: ServedModel
    milliseconds: float
