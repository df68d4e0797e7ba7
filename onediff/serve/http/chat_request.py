"""The request of POST /v1/chat/completions: what OpenAI's clients send, reduced to one pair and one instruction."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field

from onediff.serve.http.errors import ApiError
from onediff.serve.http.pictures import image_bytes
from onediff.serve.http.uploads import Question

MODEL = "onediff"  # the name under which clients ask for the model; it stays the same when a new version takes over


class Lenient(BaseModel):
    """A part of the request. Fields that OneDiff has no use for, such as `temperature`, are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class ImageUrl(Lenient):
    url: Annotated[str, Field(description="A data URI with base64: data:image/png;base64,... No other address.")]


class ImagePart(Lenient):
    type: Literal["image_url"]
    image_url: ImageUrl


class TextPart(Lenient):
    type: Literal["text"]
    text: str


Part = Annotated[ImagePart | TextPart, Discriminator("type")]


def _as_parts(content: Any) -> Any:
    """Return a content that is only text, or null, as a list of parts."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else [] if content is None else content


class Message(Lenient):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    parts: Annotated[list[Part], BeforeValidator(_as_parts, json_schema_input_type=str | list[Part] | None),
                     Field(alias="content")] = []

    @property
    def images(self) -> list[tuple[int, str]]:
        """The addresses of the images, each with the number of the part."""
        return [(number, part.image_url.url) for number, part in enumerate(self.parts) if isinstance(part, ImagePart)]

    @property
    def text(self) -> str:
        """All text parts, joined by spaces."""
        return " ".join(part.text.strip() for part in self.parts if isinstance(part, TextPart)).strip()


class ResponseFormat(Lenient):
    type: Literal["text", "json_object"] = "text"


class ChatRequest(Lenient):
    """A chat completion with one message of the role `user` that contains two images.

    Fields that OneDiff has no use for are ignored, because captions are decoded greedily and end by themselves.
    """

    model: Annotated[str, Field(json_schema_extra={"enum": [MODEL]})]
    messages: Annotated[list[Message], Field(min_length=1)]
    stream: bool | None = False
    response_format: ResponseFormat | None = None
    n: Literal[1] | None = 1


def body_schema() -> dict[str, Any]:
    """Return the JSON schema of ChatRequest without references, because OpenAPI resolves references elsewhere."""
    schema = ChatRequest.model_json_schema()
    return dict(_inlined(schema, schema["$defs"]))


def _inlined(schema: Any, definitions: dict[str, Any]) -> Any:
    if isinstance(schema, list):
        return [_inlined(item, definitions) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inlined(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    return {key: _inlined(value, definitions) for key, value in schema.items() if key not in ("$defs", "discriminator")}


def chat_question(request: ChatRequest) -> tuple[Question, list[str]]:
    """Return the pair and the instruction of a chat request, and warnings about what of the request is ignored.

    The pair is that of the last message of the user that has images: the first and the last image. The instruction is
    the text of the last message of the user that has text, from that message on. Raises ApiError for fewer than two
    images, and for images that are no data URIs.
    """
    users = [(place, message) for place, message in enumerate(request.messages) if message.role == "user"]
    place, chosen = next((item for item in reversed(users) if item[1].images), (len(request.messages) - 1, None))
    images = chosen.images if chosen else []
    if len(images) < 2:
        param = f"messages.{place}.content"
        raise ApiError(422, f"{param}: a message of the role user must contain two parts of type image_url, the image "
                            f"before and the image after, got {len(images)}; send both images in one message",
                       code="invalid_value", param=param)
    params = [(url, f"messages.{place}.content.{number}.image_url.url") for number, url in images]
    for url, param in params:
        if url[:5].lower() != "data:":
            raise ApiError(422, f"{param}: must be a data URI such as data:image/png;base64,..., because this server "
                                "opens no address and no file; send the content of the image", code="address_refused",
                           param=param)
    texts = [(number, message.text) for number, message in users if number >= place and message.text]
    source, instruction = texts[-1] if texts else (place, None)
    warnings = _warnings(len(images), unused=len(request.messages) - len({place, source}))
    return Question(image_bytes(*params[0]), image_bytes(*params[-1]), instruction), warnings


def _warnings(count: int, unused: int) -> list[str]:
    """Return what the answer ignores of a request with `count` images and `unused` further messages."""
    images = [f"of {count} images, only the first and the last were compared"] if count > 2 else []
    others = [f"{unused} other messages were ignored: the model reads one pair of images and one instruction"]
    return images + (others if unused else [])
