from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from serving import RunningServer, base64_text, image_file, pair_body, running_server

from onediff.config import Serve
from onediff.model.captioner import Captioner

if TYPE_CHECKING:
    from openai import OpenAI  # The import takes seconds, and `make test` imports every test file in every process.

QUESTION = "How was the image edited?"


def image(seed: int) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64_text(image_file(seed))}"}}


def user(*parts: dict[str, Any]) -> list[Any]:
    return [{"role": "user", "content": list(parts)}]


@pytest.fixture(scope="module")
def chats(server: RunningServer) -> Iterator[OpenAI]:
    """OpenAI's own client."""
    import openai

    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0,
                       http_client=httpx.Client(trust_env=False)) as client:
        yield client


@pytest.fixture
def caption(client: httpx.Client) -> dict[str, Any]:
    """The answer of `/v1/captions` about the images 3 and 5 with an instruction, without its time."""
    answer = client.post("/v1/captions", json=pair_body(3, 5) | {"instruction": QUESTION}).json()
    return {key: value for key, value in answer.items() if key != "milliseconds"}


def test_a_chat_completion_has_the_caption_of_the_pair(chats: OpenAI, caption: dict[str, Any]) -> None:
    completion = chats.chat.completions.create(model="onediff", temperature=0.7, max_tokens=3, messages=user(
        image(3), {"type": "text", "text": QUESTION}, image(5)))
    (choice,) = completion.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == (
        "assistant", caption["caption"], "stop")
    assert (completion.model, completion.system_fingerprint) == ("onediff/1", caption["model"]["digest"])
    assert completion.model_extra == {"warnings": []}


def test_a_stream_has_the_same_caption_and_the_warnings(chats: OpenAI, caption: dict[str, Any]) -> None:
    chunks = list(chats.chat.completions.create(model="onediff", stream=True, messages=user(
        image(3), image(7), image(5), {"type": "text", "text": QUESTION})))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == caption["caption"]
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None, None, "stop"]
    assert {chunk.model for chunk in chunks} == {"onediff/1"} and len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].model_extra == {"warnings": ["of 3 images, only the first and the last were compared"]}


def test_a_json_object_has_the_fields_of_a_caption(chats: OpenAI, caption: dict[str, Any]) -> None:
    completion = chats.chat.completions.create(
        model="onediff", response_format={"type": "json_object"},
        messages=user(image(3), image(5), {"type": "text", "text": QUESTION}))
    fields = json.loads(completion.choices[0].message.content or "")
    assert fields.pop("milliseconds") > 0
    assert fields.pop("confidence") == pytest.approx(caption.pop("confidence"), abs=1e-4)
    assert fields == caption


def test_the_list_of_models_has_the_name_that_a_completion_accepts(chats: OpenAI) -> None:
    import openai

    assert [model.id for model in chats.models.list()] == ["onediff"]
    assert chats.models.retrieve("onediff").id == "onediff"
    with pytest.raises(openai.NotFoundError) as failure:
        chats.models.retrieve("gpt-4o")
    assert failure.value.code == "model_not_found"


@pytest.mark.parametrize(("wrong", "status", "code", "param"), [
    ({"model": "gpt-4o"}, 404, "model_not_found", "model"),
    ({"n": 2}, 422, "invalid_value", "n"),
    ({"messages": user(image(3))}, 422, "invalid_value", "messages.0.content"),
    ({"messages": user(image(3), {"type": "image_url", "image_url": {"url": "http://127.0.0.1/healthz"}})}, 422,
     "address_refused", "messages.0.content.1.image_url.url"),
    ({"messages": user(image(3), {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}})}, 422,
     "address_refused", "messages.0.content.1.image_url.url"),
    ({"messages": user(image(3), {"type": "image_url", "image_url": {"url": "data:image/png;base64,YWE="}})}, 422,
     "corrupt_image", "after")])
def test_openais_client_understands_every_refusal(chats: OpenAI, wrong: dict[str, Any], status: int, code: str,
                                                  param: str) -> None:
    import openai

    with pytest.raises(openai.APIStatusError) as failure:
        chats.chat.completions.create(**{"model": "onediff", "messages": user(image(3), image(5)), **wrong})
    assert (failure.value.status_code, failure.value.code, failure.value.param) == (status, code, param)
    assert failure.value.type == "invalid_request_error"


def test_a_very_long_text_is_refused_before_the_tokenizer_reads_it(chats: OpenAI) -> None:
    import openai

    text = {"type": "text", "text": "word " * 1000}
    with pytest.raises(openai.UnprocessableEntityError, match="instruction: must have at most 2000 characters"):
        chats.chat.completions.create(model="onediff", messages=user(image(3), image(5), text))


def test_a_body_that_is_not_json_is_refused(client: httpx.Client) -> None:
    answers = [client.post("/v1/chat/completions", content=b"{", headers={"content-type": kind})
               for kind in ("application/json", "text/plain")]
    assert [(answer.status_code, answer.json()["error"]["code"]) for answer in answers] == [
        (422, "invalid_json"), (415, "unsupported_content_type")]


def test_with_a_key_the_addresses_of_the_protocol_need_it(served_captioner: Captioner) -> None:
    import openai

    with running_server(served_captioner, Serve(), api_key="secret") as server:
        for key, allowed in (("secret", True), ("wrong", False)):
            with openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0,
                               http_client=httpx.Client(trust_env=False)) as client:
                if allowed:
                    assert len(client.models.list().data) == 1
                    continue
                with pytest.raises(openai.AuthenticationError, match="API key"):
                    client.models.list()
                with pytest.raises(openai.AuthenticationError, match="API key"):
                    client.chat.completions.create(model="onediff", messages=user(image(3), image(5)))
