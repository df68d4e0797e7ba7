"""Chat completions in the protocol of OpenAI's API, so that programs that speak it can ask what changed."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ValidationError

from onediff.serve.http.chat_request import MODEL, ChatRequest, body_schema, chat_question
from onediff.serve.http.errors import ApiError, ErrorBody, wrong_value
from onediff.serve.http.schemas import CaptionAnswer
from onediff.serve.http.service import Service
from onediff.serve.http.uploads import Body, Question, check_values

NOT_FOUND: dict[int | str, dict[str, Any]] = {
    404: {"model": ErrorBody, "description": "The name of the model is unknown."}}


class ServedName(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "onediff"


class ServedNames(BaseModel):
    object: Literal["list"] = "list"
    data: list[ServedName]


class AnswerMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: str | None = None


class Choice(BaseModel):
    index: int = 0
    message: AnswerMessage
    logprobs: None = None
    finish_reason: Literal["stop"] = "stop"


class ChatCompletion(BaseModel):
    """A caption as OpenAI's clients expect it.

    `model` contains the version and `system_fingerprint` the digest of the model that wrote the caption. `warnings`
    says what of the request was ignored.
    """

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    system_fingerprint: str
    warnings: list[str]


def chat_router(service: Service) -> APIRouter:
    """Return the addresses /v1/chat/completions and /v1/models."""
    router = APIRouter(tags=["OpenAI"])
    name = ServedName(id=MODEL, created=int(time.time()))

    @router.get("/v1/models", response_model=ServedNames)
    async def models() -> ServedNames:
        """List the names of models that a chat completion accepts."""
        return ServedNames(data=[name])

    @router.get("/v1/models/{model}", response_model=ServedName, responses=NOT_FOUND)
    async def model(model: str) -> ServedName:
        """Describe the model with this name."""
        _check_name(model)
        return name

    @router.post("/v1/chat/completions", response_model=ChatCompletion, openapi_extra={"requestBody": {
        "required": True, "content": {"application/json": {"schema": body_schema()}}}},
        responses=NOT_FOUND | {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}})
    async def chat_completions(request: Request) -> Response:
        """Describe what changed between two images of one message, which are sent as data URIs."""
        asked: list[tuple[ChatRequest, list[str]]] = []

        async def read(body: Body) -> list[Question]:
            kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                raise ApiError(415, f"the content type must be application/json, got '{kind[:80]}'",
                               code="unsupported_content_type", headers={"connection": "close"})
            chat, question, warnings = await service.in_thread(_parsed, await body.read())
            asked.append((chat, warnings))
            return [question]

        (answer,) = await service.answer(request, read)
        ((chat, warnings),) = asked
        wants_json = chat.response_format is not None and chat.response_format.type == "json_object"
        content = json.dumps(answer.model_dump(exclude_unset=True)) if wants_json else answer.caption
        completion = _completion(answer, content, warnings)
        if chat.stream:
            return StreamingResponse(_events(completion), media_type="text/event-stream")
        return JSONResponse(completion.model_dump())

    return router


def _parsed(body: bytes) -> tuple[ChatRequest, Question, list[str]]:
    """Return the request in a body, its pair, and warnings. Raises ApiError for an invalid body."""
    check_values(body)
    try:
        chat = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        raise wrong_value(error) from None
    _check_name(chat.model)
    return chat, *chat_question(chat)


def _check_name(model: str) -> None:
    if model != MODEL:
        raise ApiError(404, f"model: '{model[:80]}' does not exist; the model of this server is '{MODEL}'",
                       code="model_not_found", param="model")


def _completion(answer: CaptionAnswer, content: str, warnings: list[str]) -> ChatCompletion:
    return ChatCompletion(id=f"chatcmpl-{uuid.uuid4().hex}", created=int(time.time()),
                          model=f"{MODEL}/{answer.model.version}", system_fingerprint=answer.model.digest,
                          choices=[Choice(message=AnswerMessage(content=content))], warnings=warnings)


def _events(completion: ChatCompletion) -> Iterator[str]:
    """Yield a completion as the server-sent events of a stream. The caption is complete before, so it is one event."""
    shared = completion.model_dump(exclude={"choices"}) | {"object": "chat.completion.chunk"}
    steps: list[tuple[dict[str, Any], str | None]] = [
        ({"role": "assistant", "content": ""}, None), ({"content": completion.choices[0].message.content}, None),
        ({}, "stop")]
    for delta, finish_reason in steps:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        yield f"data: {json.dumps(shared | {'choices': [choice]})}\n\n"
    yield "data: [DONE]\n\n"
