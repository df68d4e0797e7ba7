"""One request to the writer or the judge: its text and images, the key of its stored answer, and its cost.

Two token counts are computed for each request. The expected count assumes 4 characters per token and an answer of 60
tokens. The upper bound assumes one token per byte of UTF-8, because no byte-level tokenizer makes more, and an answer
of `max_tokens`. Images are sent with at most one tile of 512 x 512 pixels. By OpenAI's tile rule, such an image costs
85 + 170 = 255 tokens, and 2,833 + 5,667 = 8,500 tokens with gpt-4o-mini; the bound uses 8,500 for every model.
"""

from __future__ import annotations

import base64
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from string import Template
from typing import Any, Literal

from onediff.config import Runtime, Writer
from onediff.data.record import digest
from onediff.inputs.images import jpeg, open_image

Form = Literal["differences", "edit", "judgement"]
# Images are reduced to this longest side, so that each image costs one tile of 512 x 512 pixels.
IMAGE_PX = 512
JPEG_QUALITY = 90
ANSWER_TOKENS = 60
MESSAGE_TOKENS = 16  # number of tokens that the roles and the chat format add to a text
IMAGE_TOKENS, MAX_IMAGE_TOKENS = 255, 8500

_SECTIONS: dict[Form, str] = {"differences": "data.writer", "edit": "data.writer", "judgement": "judge"}
_TEXT = {"type": "string"}
# Some endpoints reject keywords such as minItems; therefore answers.py checks the number of sentences instead.
SCHEMAS: dict[Form, dict[str, Any]] = {
    "differences": {"type": "object", "properties": {"differences": {"type": "array", "items": _TEXT}},
                    "required": ["differences"], "additionalProperties": False},
    "edit": {"type": "object", "properties": {"edit": _TEXT, "output": _TEXT},
             "required": ["edit", "output"], "additionalProperties": False},
    "judgement": {"type": "object", "properties": {"states": {"type": "string", "enum": ["yes", "no", "partly"]},
                                                   "invents": {"type": "string", "enum": ["yes", "no"]}},
                  "required": ["states", "invents"], "additionalProperties": False},
}


@dataclass(frozen=True)
class Request:
    """One question to the writer or the judge.

    `name` is a pair_id or the name of an image; it is not sent. `system` and `user` are the two texts of the prompt.
    `images` are the original encoded image files, which are made smaller when they are sent.
    """

    name: str
    form: Form
    writer: Writer
    system: str
    user: str
    images: tuple[bytes, ...] = ()

    @functools.cached_property
    def key(self) -> str:
        """The digest of everything that can change the answer; requests with equal keys are sent and paid for once."""
        images = [{"sha256": digest(image), "px": IMAGE_PX, "quality": JPEG_QUALITY} for image in self.images]
        question = {"form": self.form, "schema": SCHEMAS[self.form], "system": self.system, "user": self.user,
                    "images": images, **self.writer.model_dump()}
        return digest(json.dumps(question, sort_keys=True).encode())

    @property
    def section(self) -> str:
        """The section of params.yaml that holds the settings of this request: `data.writer` or `judge`."""
        return _SECTIONS[self.form]

    def body(self) -> dict[str, Any]:
        """Return the JSON body of the HTTP request; raise ValueError if an image cannot be decoded."""
        content: str | list[dict[str, Any]] = self.user
        if self.images:
            images = [{"type": "image_url", "image_url": {"url": _data_uri(name, image)}}
                      for name, image in zip(("first", "second"), self.images, strict=True)]
            content = [{"type": "text", "text": self.user}, *images]
        schema = {"name": self.form, "strict": True, "schema": SCHEMAS[self.form]}
        return {"model": self.writer.model, "temperature": self.writer.temperature,
                "max_tokens": self.writer.max_tokens,
                "messages": [{"role": "system", "content": self.system}, {"role": "user", "content": content}],
                "response_format": {"type": "json_schema", "json_schema": schema}}


def _data_uri(name: str, image: bytes) -> str:
    """Return the image as a data URI with a JPEG file, whose longer side is at most IMAGE_PX pixels."""
    try:
        picture = open_image(image)
    except ValueError as error:
        raise ValueError(f"{name} {error}") from None
    picture.thumbnail((IMAGE_PX, IMAGE_PX))
    return "data:image/jpeg;base64," + base64.b64encode(jpeg(picture, quality=JPEG_QUALITY)).decode()


def differences_from_captions(name: str, writer: Writer, *, before: str, after: str, edit: str) -> Request:
    """Return a request that asks for the differences of two images and contains only a caption of each image.

    This is the method of the OneDiff paper. `edit` is the instruction that made the second image, or empty.
    """
    return _filled(name, "differences", writer, "differences_text", before=_quoted(before), after=_quoted(after),
                   edit=_quoted(edit) if edit else "none")


def differences_from_images(name: str, writer: Writer, *, before: bytes, after: bytes) -> Request:
    """Return a request that asks for the differences of two images and contains the images themselves."""
    return replace(_filled(name, "differences", writer, "differences_vision"), images=(before, after))


def edit_of_caption(name: str, writer: Writer, *, caption: str) -> Request:
    """Return a request for an edit instruction that suits the caption of an image, as in InstructPix2Pix.

    The request contains only text, so its key does not depend on the configured mode.
    """
    return _filled(name, "edit", writer.model_copy(update={"mode": "text"}), "edit", caption=_quoted(caption))


def judgement_of_caption(name: str, writer: Writer, *, caption: str, references: Sequence[str]) -> Request:
    """Return a request to the judge that asks whether a caption of a pair is true, given the references of the pair."""
    return _filled(name, "judgement", writer, "judgement", caption=_quoted(caption),
                   references="[" + ", ".join(map(_quoted, references)) + "]")


def _filled(name: str, form: Form, writer: Writer, prompt: str, **words: str) -> Request:
    system, user = load_prompt(writer.prompts, prompt, section=_SECTIONS[form])
    return Request(name, form, writer, system, user.substitute(words))


@functools.cache
def load_prompt(version: str, name: str, *, section: str = "data.writer") -> tuple[str, Template]:
    """Return the system prompt and the template of the user prompt from the file `name` of a prompt version.

    A line `---` separates the two prompts in the file. Raises ValueError, which mentions the key `section`.prompts of
    params.yaml, if the version does not exist.
    """
    root = resources.files("onediff.data.writer") / "prompts"
    known = sorted(folder.name for folder in root.iterdir() if folder.is_dir())
    if version not in known:
        raise ValueError(f"params.yaml: {section}.prompts: must be one of {', '.join(known)}, got '{version}'")
    system, user = (root / version / f"{name}.md").read_text(encoding="utf-8").split("\n---\n")
    return system.strip(), Template(user.strip())


def _quoted(caption: str) -> str:
    return json.dumps(" ".join(caption.split()), ensure_ascii=False)


@dataclass(frozen=True)
class Tokens:
    input: int
    output: int

    def __add__(self, other: Tokens) -> Tokens:
        return Tokens(self.input + other.input, self.output + other.output)

    def usd(self, runtime: Runtime) -> float:
        """Return the cost of these tokens in dollars.

        Raises ValueError if a price is not set in runtime.yaml, because no request may be sent at an unknown price.
        """
        prices = {"input": runtime.writer_usd_per_million_input, "output": runtime.writer_usd_per_million_output}
        for name, price in prices.items():
            if price is None:
                raise ValueError(f"runtime.yaml: writer_usd_per_million_{name} is not set: give the price of a million "
                                 f"{name} tokens in US dollars, or 0 for an endpoint that you run yourself")
        return (self.input * (prices["input"] or 0) + self.output * (prices["output"] or 0)) / 1e6


def expected_tokens(request: Request) -> Tokens:
    """Estimate the number of tokens of a request and of the answer to the request."""
    image = MAX_IMAGE_TOKENS if request.writer.model.startswith("gpt-4o-mini") else IMAGE_TOKENS
    text = -(-sum(map(len, _texts(request))) // 4)
    return Tokens(MESSAGE_TOKENS + text + image * len(request.images), min(ANSWER_TOKENS, request.writer.max_tokens))


def max_tokens(request: Request) -> Tokens:
    """Return an upper bound of the number of tokens of a request and of the answer to the request."""
    text = sum(len(text.encode("utf-8", "surrogatepass")) for text in _texts(request))
    return Tokens(MESSAGE_TOKENS + text + MAX_IMAGE_TOKENS * len(request.images), request.writer.max_tokens)


def _texts(request: Request) -> tuple[str, str, str]:
    return request.system, request.user, json.dumps(SCHEMAS[request.form])
