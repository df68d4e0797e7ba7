"""The request of POST /v1/chat/completions: what OpenAI's clients send, reduced to one pair and one instruction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field

IMAGES_NEEDED = "two parts of type image_url, the image before and the image after"
_DATA = "data:"


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


class Message(Lenient):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[Part] | None = None

    @property
    def images(self) -> list[str]:
        """The addresses of the images, in order."""
        return [part.image_url.url for part in self.parts if isinstance(part, ImagePart)]

    @property
    def text(self) -> str:
        """All text parts, joined by spaces."""
        return " ".join(part.text.strip() for part in self.parts if isinstance(part, TextPart)).strip()

    @property
    def parts(self) -> list[ImagePart | TextPart]:
        """The content as a list of parts."""
        return [TextPart(type="text", text=self.content)] if isinstance(self.content, str) else self.content or []


class ResponseFormat(Lenient):
    type: Literal["text", "json_object"] = "text"


class ChatRequest(Lenient):
    """A chat completion with one message of the role `user` that contains two images.

    Fields that OneDiff has no use for are ignored, because captions are decoded greedily and end by themselves.
    """

    model: Annotated[str, Field(examples=["onediff"])]
    messages: Annotated[list[Message], Field(min_length=1)]
    stream: bool | None = False
    response_format: ResponseFormat | None = None
    n: Literal[1] | None = 1


@dataclass(frozen=True)
class ChatPair:
    """The pair of a chat request: two data URIs, the instruction or None for the default, and warnings for the user."""

    before: str
    after: str
    instruction: str | None
    warnings: list[str]


class ChatError(ValueError):
    """A chat request without a usable pair. `param` is the place in the request."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


def chat_pair(request: ChatRequest) -> ChatPair:
    """Return the pair of the last message of the user that has images.

    The instruction is the text of the last message of the user that has text, from that message on. Of more than two
    images, the first and the last are the pair, with a warning. Raises ChatError for fewer than two images and for
    addresses other than data URIs.
    """
    users = [(place, message) for place, message in enumerate(request.messages) if message.role == "user"]
    place, chosen = next((item for item in reversed(users) if item[1].images), (len(request.messages) - 1, None))
    count = len(chosen.images) if chosen else 0
    if chosen is None or count < 2:
        raise ChatError(f"messages[{place}].content", f"a message of the role user must contain {IMAGES_NEEDED}, "
                                                      f"got {count}: send both images in one message")
    for number, part in enumerate(chosen.parts):
        if isinstance(part, ImagePart) and not part.image_url.url.startswith(_DATA):
            raise ChatError(f"messages[{place}].content[{number}].image_url.url",
                            "must be a data URI with base64, such as data:image/png;base64,..., got another address: "
                            "the server opens no address and no file, so send the content of the image")
    texts = [(number, message.text) for number, message in users if number >= place and message.text]
    source, instruction = texts[-1] if texts else (place, None)
    return ChatPair(chosen.images[0], chosen.images[-1], instruction,
                    _warnings(count, unused=len(request.messages) - len({place, source})))


def _warnings(count: int, unused: int) -> list[str]:
    """Return what the answer ignores of a request with `count` images and `unused` further messages."""
    images = [f"of {count} images, only the first and the last were compared"] if count > 2 else []
    others = [f"{unused} other messages were ignored: the model reads one pair of images and one instruction"]
    return images + (others if unused else [])
