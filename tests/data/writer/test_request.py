"""Requests: equal questions have equal keys, and the bound of tokens is never below what a tokenizer makes."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from onediff.config import Runtime, Writer
from onediff.data.writer import request as module
from onediff.data.writer.request import (
    IMAGE_PX,
    SCHEMAS,
    Tokens,
    differences_from_captions,
    differences_from_images,
    edit_of_caption,
    expected_tokens,
    load_prompt,
    max_tokens,
)

ROOT = Path(__file__).parents[3]
PROMPTS = Path(module.__file__).parent / "prompts"


def picture(width: int, height: int, grey: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), grey, np.uint8)).save(file, "PNG")
    return file.getvalue()


def test_the_body_is_a_chat_completion_request_with_a_json_schema(writer: Writer) -> None:
    request = differences_from_captions("a", writer, before='a "red"\n car', after="a $5 note", edit="")
    body = request.body()
    system = (PROMPTS / "v1/differences_text.md").read_text().split("\n---\n")[0].strip()
    user = 'Caption of the first image: "a \\"red\\" car"\nCaption of the second image: "a $5 note"\nEdit: none'
    assert body == {
        "model": "tiny-writer", "temperature": 0.7, "max_tokens": 61,
        "messages": [{"role": "system", "content": system}, {"role": "user", "content": user}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "differences", "strict": True,
                                                                   "schema": SCHEMAS["differences"]}}}


def test_images_are_sent_in_order_and_reduced(writer: Writer) -> None:
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


def test_texts_and_images_change_the_key_but_the_name_does_not(writer: Writer) -> None:
    def captions(name: str, before: str, after: str, edit: str = "") -> str:
        return differences_from_captions(name, writer, before=before, after=after, edit=edit).key

    def images(before: int, after: int) -> str:
        return differences_from_images("a", writer, before=picture(8, 8, before), after=picture(8, 8, after)).key

    assert captions("a", "x", "y") == captions("b", "x", "y ")
    assert len({captions("a", "x", "y"), captions("a", "y", "x"), captions("a", "x", "y", "z"), images(1, 2),
                images(2, 1), images(1, 1), edit_of_caption("a", writer, caption="x").key}) == 7


def test_the_mode_does_not_change_the_key_of_an_edit_request(writer: Writer) -> None:
    vision = writer.model_copy(update={"mode": "vision"})
    assert edit_of_caption("a", vision, caption="x").key == edit_of_caption("a", writer, caption="x").key


def test_the_prompt_is_part_of_the_key(writer: Writer) -> None:
    request = edit_of_caption("a", writer, caption="x")
    assert replace(request, system=request.system + ".").key != request.key


def test_every_prompt_version_is_complete_and_describes_the_json_of_the_answer() -> None:
    forms = {"differences_text": "differences", "differences_vision": "differences", "edit": "edit"}
    for version in sorted(PROMPTS.iterdir()):
        for name, form in forms.items():
            system, user = load_prompt(version.name, name)
            example = json.loads(system[system.rindex("{"):])
            assert set(example) == set(SCHEMAS[form]["required"])
            assert user.template


def test_the_error_for_an_unknown_prompt_version_lists_the_known_versions(writer: Writer) -> None:
    with pytest.raises(ValueError, match=r"data.writer.prompts: must be one of v1, got 'v9'"):
        edit_of_caption("a", writer.model_copy(update={"prompts": "v9"}), caption="x")


def test_a_broken_image_is_an_error(writer: Writer) -> None:
    with pytest.raises(ValueError, match="first image: not an image"):
        differences_from_images("a", writer, before=b"GIF8 no", after=b"").body()


@pytest.mark.parametrize("caption", ["a red car on a street", "\u732b\u304c\u3044\u308b" * 20, "\U0001f408" * 30,
                                     "x" * 997])
def test_a_byte_level_tokenizer_never_exceeds_the_token_bound(writer: Writer, caption: str) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(ROOT / "presets/backbones/tiny/language/tokenizer.json"))
    request = differences_from_captions("a", writer, before=caption, after=caption, edit=caption)
    assert len(tokenizer.encode(request.system + request.user).ids) <= max_tokens(request).input
    assert expected_tokens(request).input < max_tokens(request).input
    assert max_tokens(request).output == writer.max_tokens


def test_the_expected_tokens_of_an_image_depend_on_the_model(writer: Writer) -> None:
    def tokens(model: str, images: int) -> int:
        named = writer.model_copy(update={"model": model})
        request = differences_from_images("a", named, before=b"x", after=b"y")
        return expected_tokens(replace(request, images=request.images[:images])).input

    assert tokens("gpt-4o", 2) - tokens("gpt-4o", 0) == 2 * 255
    assert tokens("gpt-4o-mini-2024-07-18", 2) - tokens("gpt-4o-mini", 0) == 2 * 8500


def test_prices_are_per_million_tokens(runtime: Runtime) -> None:
    assert Tokens(300_000, 20_000).usd(runtime) == pytest.approx(0.3 * 10 + 0.02 * 100)


@pytest.mark.parametrize("name", ["input", "output"])
def test_the_error_for_a_missing_price_contains_the_key_to_set(runtime: Runtime, name: str) -> None:
    unknown = runtime.model_copy(update={f"writer_usd_per_million_{name}": None})
    with pytest.raises(ValueError, match=rf"runtime.yaml: writer_usd_per_million_{name} is not set.*0 for an endpoint"):
        Tokens(1, 1).usd(unknown)
