from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from onediff.serve.http.chat_request import ChatRequest, chat_question
from onediff.serve.http.errors import ApiError
from onediff.serve.http.uploads import Question

RED, GREEN, BLUE = (f"data:image/png;base64,{name}" for name in ("cmVk", "Z3JlZW4=", "Ymx1ZQ=="))


def image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, "detail": "low"}}


def text(content: str) -> dict[str, Any]:
    return {"type": "text", "text": content}


def user(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def asked(*messages: dict[str, Any]) -> tuple[Question, list[str]]:
    return chat_question(ChatRequest.model_validate({"model": "onediff", "messages": messages, "temperature": 0.7}))


def test_two_images_and_the_texts_of_a_message_are_the_pair_and_the_instruction() -> None:
    assert asked(user(image(RED), image(GREEN))) == (Question(b"red", b"green"), [])
    assert asked(user(text("Before: "), image(RED), text("after:"), image(GREEN))) == (
        Question(b"red", b"green", "Before: after:"), [])


def test_of_three_images_the_first_and_the_last_are_compared_with_a_warning() -> None:
    assert asked(user(image(RED), image(BLUE), image(GREEN), text("What moved?"))) == (
        Question(b"red", b"green", "What moved?"), ["of 3 images, only the first and the last were compared"])


def test_a_conversation_gives_its_last_pair_and_its_last_question_with_a_warning() -> None:
    question, warnings = asked({"role": "system", "content": "Be brief."}, user(image(BLUE), image(BLUE)),
                   user(image(RED), image(GREEN), text("What changed?")),
                   {"role": "assistant", "content": "the cube turned green"},
                   {"role": "user", "content": "What else?"})
    assert question == Question(b"red", b"green", "What else?")
    assert warnings == ["3 other messages were ignored: the model reads one pair of images and one instruction"]


@pytest.mark.parametrize("address", ["http://127.0.0.1/a.png", "https://example.org/a.png", "file:///etc/passwd",
                                     "/etc/passwd", "", "ftp://x", " data:,"])
def test_an_address_that_is_no_data_uri_is_refused(address: str) -> None:
    with pytest.raises(ApiError, match="must be a data URI") as failure:
        asked(user(image(RED), text("What changed?"), image(address)))
    assert failure.value.param == "messages.0.content.2.image_url.url"


@pytest.mark.parametrize(("messages", "param", "count"), [
    ([user(image(RED))], "messages.0.content", 1),
    ([user(image(RED), image(GREEN)), user(image(RED))], "messages.1.content", 1),
    ([{"role": "user", "content": "hello"}], "messages.0.content", 0),
    ([{"role": "assistant", "content": None}, {"role": "system", "content": []}], "messages.1.content", 0),
    ([{"role": "system", "content": [image(RED), image(GREEN)]}], "messages.0.content", 0)])
def test_a_message_of_the_user_needs_two_images(messages: list[dict[str, Any]], param: str, count: int) -> None:
    with pytest.raises(ApiError, match=f"must contain two parts .*, got {count}; send both images") as failure:
        asked(*messages)
    assert failure.value.param == param


@pytest.mark.parametrize("wrong", [{"n": 2}, {"messages": []}, {"response_format": {"type": "json_schema"}},
                                   {"messages": [user({"type": "input_audio"})]}, {"model": None}])
def test_what_the_server_cannot_do_is_refused(wrong: dict[str, Any]) -> None:
    good = {"model": "onediff", "messages": [user(image(RED), image(GREEN))]}
    ChatRequest.model_validate(good)
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        ChatRequest.model_validate(good | wrong)
