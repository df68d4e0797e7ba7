"""One request to the writer or the judge: what is asked, in which words, and the key under which its answer is kept."""

from __future__ import annotations

import base64
import functools
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from string import Template
from typing import Any, Literal

from onediff.config import Writer
from onediff.data.record import digest
from onediff.inputs.images import open_image

Form = Literal["differences", "edit", "judgement"]
IMAGE_PX = 512  # longest side of an image that is sent: one tile where images are priced by tiles of 512
JPEG_QUALITY = 90

_TEXT = {"type": "string"}
# Without minItems and the like, which not every endpoint takes; answer.py checks the rest.
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
    """`name` says for whom (a pair_id or an image's name) and is not sent; `images` are encoded files as they came."""

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
        asked = {"form": self.form, "schema": SCHEMAS[self.form], "system": self.system, "user": self.user,
                 "images": images, **self.writer.model_dump()}
        return digest(json.dumps(asked, sort_keys=True).encode())

    @property
    def section(self) -> str:
        """Where in params.yaml the settings stand."""
        return "judge" if self.form == "judgement" else "data.writer"

    def body(self) -> dict[str, Any]:
        """The JSON that is sent. Raises ValueError for an image that cannot be read."""
        content: str | list[dict[str, Any]] = self.user
        if self.images:
            content = [{"type": "text", "text": self.user}]
            for name, image in zip(("first", "second"), self.images, strict=True):
                content.append({"type": "image_url", "image_url": {"url": _data_uri(name, image)}})
        schema = {"name": self.form, "strict": True, "schema": SCHEMAS[self.form]}
        return {"model": self.writer.model, "temperature": self.writer.temperature,
                "max_tokens": self.writer.max_tokens,
                "messages": [{"role": "system", "content": self.system}, {"role": "user", "content": content}],
                "response_format": {"type": "json_schema", "json_schema": schema}}


def _data_uri(name: str, image: bytes) -> str:
    """A JPEG of at most IMAGE_PX pixels a side, as an address that holds its own content."""
    try:
        picture = open_image(image)
    except ValueError as error:
        raise ValueError(f"{name} {error}") from None
    picture.thumbnail((IMAGE_PX, IMAGE_PX))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def differences_from_captions(name: str, writer: Writer, *, before: str, after: str, edit: str) -> Request:
    """As the paper: the writer knows each image by its caption alone. `edit` is empty where there was none."""
    system, user = load_prompt(writer.prompts, "differences_text")
    told = user.substitute(before=_quoted(before), after=_quoted(after), edit=_quoted(edit) if edit else "none")
    return Request(name, "differences", writer, system, told)


def differences_from_images(name: str, writer: Writer, *, before: bytes, after: bytes) -> Request:
    system, user = load_prompt(writer.prompts, "differences_vision")
    return Request(name, "differences", writer, system, user.substitute(), (before, after))


def edit_of_caption(name: str, writer: Writer, *, caption: str) -> Request:
    """As InstructPix2Pix: an edit invented from a caption. It is always text, so the mode leaves its key alone."""
    system, user = load_prompt(writer.prompts, "edit")
    text_only = writer.model_copy(update={"mode": "text"})
    return Request(name, "edit", text_only, system, user.substitute(caption=_quoted(caption)))


def judgement_of_caption(name: str, writer: Writer, *, caption: str, references: Sequence[str]) -> Request:
    """Whether a caption of two images is true, by what people wrote about them."""
    system, user = load_prompt(writer.prompts, "judgement", section="judge")
    told = "[" + ", ".join(map(_quoted, references)) + "]"
    return Request(name, "judgement", writer, system, user.substitute(references=told, caption=_quoted(caption)))


@functools.cache
def load_prompt(version: str, name: str, *, section: str = "data.writer") -> tuple[str, Template]:
    """The system's words, and the template of the question behind the line `---`. Raises ValueError if unknown."""
    root = resources.files("onediff.data.writer") / "prompts"
    known = sorted(folder.name for folder in root.iterdir() if folder.is_dir())
    if version not in known:
        raise ValueError(f"params.yaml: {section}.prompts: must be one of {', '.join(known)}, got '{version}'")
    system, user = (root / version / f"{name}.md").read_text(encoding="utf-8").split("\n---\n")
    return system.strip(), Template(user.strip())


def _quoted(caption: str) -> str:
    return json.dumps(" ".join(caption.split()), ensure_ascii=False)
