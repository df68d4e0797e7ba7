"""Requests: the same question has the same key, and nothing but the question changes it."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from onediff.config import Writer
from onediff.data.writer import request as module
from onediff.data.writer.request import (
    IMAGE_PX,
    SCHEMAS,
    differences_from_captions,
    differences_from_images,
    edit_of_caption,
    load_prompt,
)

PROMPTS = Path(module.__file__).parent / "prompts"


def picture(width: int, height: int, grey: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), grey, np.uint8)).save(file, "PNG")
    return file.getvalue()


def test_the_body_is_a_chat_completion_with_a_schema(writer: Writer) -> None:
    asked = differences_from_captions("a", writer, before='a "red"\n car', after="a $5 note", edit="")
    body = asked.body()
    system = (PROMPTS / "v1/differences_text.md").read_text().split("\n---\n")[0].strip()
    user = 'Caption of the first image: "a \\"red\\" car"\nCaption of the second image: "a $5 note"\nEdit: none'
    assert body == {
        "model": "tiny-writer", "temperature": 0.7, "max_tokens": 61,
        "messages": [{"role": "system", "content": system}, {"role": "user", "content": user}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "differences", "strict": True,
                                                                   "schema": SCHEMAS["differences"]}}}


def test_images_are_sent_small_and_in_order(writer: Writer) -> None:
    large, small = picture(1031, 613, 10), picture(64, 48, 200)
    content = differences_from_images("a", writer, before=large, after=small).body()["messages"][1]["content"]
    assert [part["type"] for part in content] == ["text", "image_url", "image_url"]
    sent = [Image.open(io.BytesIO(base64.b64decode(part["image_url"]["url"].split(",")[1]))) for part in content[1:]]
    assert [image.size for image in sent] == [(IMAGE_PX, 304), (64, 48)]
    assert [np.asarray(image).mean().round() for image in sent] == [10, 200]


@pytest.mark.parametrize("changed", [{"model": "other"}, {"mode": "vision"}, {"temperature": 0.0}, {"max_tokens": 62}])
def test_every_setting_changes_the_key(writer: Writer, changed: dict[str, object]) -> None:
    other = writer.model_copy(update=changed)
    keys = {differences_from_captions("a", each, before="x", after="y", edit="").key for each in (writer, other)}
    assert len(keys) == 2


def test_words_and_images_change_the_key_and_the_name_does_not(writer: Writer) -> None:
    def captions(name: str, before: str, after: str, edit: str = "") -> str:
        return differences_from_captions(name, writer, before=before, after=after, edit=edit).key

    def images(before: int, after: int) -> str:
        return differences_from_images("a", writer, before=picture(8, 8, before), after=picture(8, 8, after)).key

    assert captions("a", "x", "y") == captions("b", "x", "y ")
    assert len({captions("a", "x", "y"), captions("a", "y", "x"), captions("a", "x", "y", "z"), images(1, 2),
                images(2, 1), images(1, 1), edit_of_caption("a", writer, caption="x").key}) == 7


def test_the_mode_of_captions_does_not_change_an_edit(writer: Writer) -> None:
    vision = writer.model_copy(update={"mode": "vision"})
    assert edit_of_caption("a", vision, caption="x").key == edit_of_caption("a", writer, caption="x").key


def test_the_words_of_a_prompt_are_part_of_the_key(writer: Writer) -> None:
    asked = edit_of_caption("a", writer, caption="x")
    assert replace(asked, system=asked.system + ".").key != asked.key


def test_every_version_has_every_prompt_and_names_its_json() -> None:
    forms = {"differences_text": "differences", "differences_vision": "differences", "edit": "edit"}
    for version in sorted(PROMPTS.iterdir()):
        for name, form in forms.items():
            system, user = load_prompt(version.name, name)
            example = json.loads(system[system.rindex("{"):])
            assert set(example) == set(SCHEMAS[form]["required"])
            assert user.template


def test_an_unknown_version_names_the_known_ones(writer: Writer) -> None:
    with pytest.raises(ValueError, match=r"data.writer.prompts: must be one of v1, got 'v9'"):
        edit_of_caption("a", writer.model_copy(update={"prompts": "v9"}), caption="x")


def test_a_broken_image_is_refused(writer: Writer) -> None:
    with pytest.raises(ValueError, match="first image: not an image"):
        differences_from_images("a", writer, before=b"GIF8 no", after=b"").body()
