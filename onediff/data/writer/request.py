"""One request to the writer or the judge: its content, its words, the key under which its answer is stored, its price.

Expected tokens: a token per 4 characters, 60 tokens of answer. Bound: a token per byte of UTF-8 and all of max_tokens,
because no byte-level tokenizer makes more. An image of at most one tile of 512 px: 255 tokens (85 + 170 of OpenAI's
tile rule), 8,500 with gpt-4o-mini (2,833 + 5,667); the bound takes the larger for every model.
"""

from __future__ import annotations

import base64
import functools
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from string import Template
from typing import Any, Literal

from onediff.config import Runtime, Writer
from onediff.data.record import digest
from onediff.inputs.images import open_image

Form = Literal["differences", "edit", "judgement"]
IMAGE_PX = 512  # longest side of an image that is sent: one tile where images are priced by tiles of 512
JPEG_QUALITY = 90
ANSWER_TOKENS = 60
MESSAGE_TOKENS = 16  # what roles and the chat format add
IMAGE_TOKENS, MAX_IMAGE_TOKENS = 255, 8500

_SECTIONS: dict[Form, str] = {"differences": "data.writer", "edit": "data.writer", "judgement": "judge"}
_TEXT = {"type": "string"}
# Without minItems and the like, which not every endpoint takes; answers.py checks the rest.
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
    """`name` is the pair_id or the name of the image and is not sent; `images` are encoded files as they came."""

    name: str
    form: Form
    writer: Writer
    system: str
    user: str
    images: tuple[bytes, ...] = ()

    @functools.cached_property
    def key(self) -> str:
        """Digest of all that can change the answer: equal keys are one question, asked and paid for once."""
        images = [{"sha256": digest(image), "px": IMAGE_PX, "quality": JPEG_QUALITY} for image in self.images]
        question = {"form": self.form, "schema": SCHEMAS[self.form], "system": self.system, "user": self.user,
                    "images": images, **self.writer.model_dump()}
        return digest(json.dumps(question, sort_keys=True).encode())

    @property
    def section(self) -> str:
        """The section of params.yaml that holds the settings."""
        return _SECTIONS[self.form]

    def body(self) -> dict[str, Any]:
        """The JSON that is sent. Raises ValueError for an image that cannot be read."""
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
    """A JPEG of at most IMAGE_PX pixels a side, as an address that holds the content."""
    try:
        picture = open_image(image)
    except ValueError as error:
        raise ValueError(f"{name} {error}") from None
    picture.thumbnail((IMAGE_PX, IMAGE_PX))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def differences_from_captions(name: str, writer: Writer, *, before: str, after: str, edit: str) -> Request:
    """As in the paper: the writer knows each image by its caption only. `edit` is empty where there was none."""
    return _filled(name, "differences", writer, "differences_text", before=_quoted(before), after=_quoted(after),
                   edit=_quoted(edit) if edit else "none")


def differences_from_images(name: str, writer: Writer, *, before: bytes, after: bytes) -> Request:
    return replace(_filled(name, "differences", writer, "differences_vision"), images=(before, after))


def edit_of_caption(name: str, writer: Writer, *, caption: str) -> Request:
    """As InstructPix2Pix: an edit invented from a caption. It is always text, so the mode does not change its key."""
    return _filled(name, "edit", writer.model_copy(update={"mode": "text"}), "edit", caption=_quoted(caption))


def judgement_of_caption(name: str, writer: Writer, *, caption: str, references: Sequence[str]) -> Request:
    """Whether a caption of two images is true, by what people wrote about them."""
    return _filled(name, "judgement", writer, "judgement", caption=_quoted(caption),
                   references="[" + ", ".join(map(_quoted, references)) + "]")


def _filled(name: str, form: Form, writer: Writer, prompt: str, **words: str) -> Request:
    system, user = load_prompt(writer.prompts, prompt, section=_SECTIONS[form])
    return Request(name, form, writer, system, user.substitute(words))


@functools.cache
def load_prompt(version: str, name: str, *, section: str = "data.writer") -> tuple[str, Template]:
    """The system's words, and the template of the question after the line `---`. Raises ValueError if unknown."""
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
        """Raises ValueError where a price is unknown: no request may be sent then."""
        prices = {"input": runtime.writer_usd_per_million_input, "output": runtime.writer_usd_per_million_output}
        for name, price in prices.items():
            if price is None:
                raise ValueError(f"runtime.yaml: writer_usd_per_million_{name} is not set: give what a million {name} "
                                 "tokens cost, 0 for an endpoint of your own")
        return (self.input * (prices["input"] or 0) + self.output * (prices["output"] or 0)) / 1e6


def expected_tokens(request: Request) -> Tokens:
    image = MAX_IMAGE_TOKENS if request.writer.model.startswith("gpt-4o-mini") else IMAGE_TOKENS
    text = -(-sum(map(len, _texts(request))) // 4)
    return Tokens(MESSAGE_TOKENS + text + image * len(request.images), min(ANSWER_TOKENS, request.writer.max_tokens))


def max_tokens(request: Request) -> Tokens:
    """A request never takes more than this."""
    text = sum(len(text.encode("utf-8", "surrogatepass")) for text in _texts(request))
    return Tokens(MESSAGE_TOKENS + text + MAX_IMAGE_TOKENS * len(request.images), request.writer.max_tokens)


def _texts(request: Request) -> tuple[str, str, str]:
    return request.system, request.user, json.dumps(SCHEMAS[request.form])
