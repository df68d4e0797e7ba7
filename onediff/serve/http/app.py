"""The addresses of the server. `create_app` joins them to a service, which loads versions and writes captions."""

from __future__ import annotations

import secrets
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel
from starlette.types import ASGIApp, Receive, Scope, Send

from onediff.serve.http.api_docs import add_docs
from onediff.serve.http.chat import chat_router
from onediff.serve.http.errors import ApiError, ErrorBody, add_error_handlers
from onediff.serve.http.metrics import MeasuredRequests
from onediff.serve.http.schemas import CaptionAnswer, PairRequest
from onediff.serve.http.service import Service
from onediff.serve.http.uploads import Body, Question, form_question, json_questions
from onediff.serve.http.web_page import add_page

REFUSALS = {401: "The API key is wrong or missing.", 408: "The body arrives too slowly.",
            413: "The body, an image or the list of pairs is too large.",
            415: "The content type is neither JSON nor multipart, or the body is compressed.",
            422: "A value of the request is wrong.",
            429: "Too many pairs wait already.", 500: "The server has an internal error.",
            503: "The model is still loading.", 504: "The caption took too long."}


class Readiness(BaseModel):
    """Whether the server can take a request, which version serves, and why a newer version does not serve."""

    ready: bool
    version: str | None
    digest: str | None
    problem: str | None


class HeadAsGet:
    """ASGI middleware that handles HEAD like GET. uvicorn leaves out the body of the answer."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app({**scope, "method": "GET"} if scope.get("method") == "HEAD" else scope, receive, send)


def create_app(service: Service, *, api_key: str | None = None) -> FastAPI:
    """Return the application. With an `api_key`, the addresses below /v1 need the header Authorization: Bearer KEY."""
    app = FastAPI(title="OneDiff", summary="Describes in one sentence what changed between two images.",
                  lifespan=service.running, docs_url=None, redoc_url=None, redirect_slashes=False)
    add_error_handlers(app)
    app.add_middleware(MeasuredRequests, metrics=service.metrics)
    app.add_middleware(HeadAsGet)
    app.include_router(_operation(service))
    allowed = [Depends(_key_check(api_key))] if api_key else []
    for router in (_captions(service), chat_router(service)):
        app.include_router(router, dependencies=allowed, responses=refusals())
    add_page(app, needs_key=api_key is not None)
    add_docs(app)
    return app


def refusals() -> dict[int | str, dict[str, Any]]:
    """Return the entry `responses` of a FastAPI route whose requests need a caption."""
    return {status: {"model": ErrorBody, "description": meaning} for status, meaning in REFUSALS.items()}


def _key_check(api_key: str) -> Any:
    """Return the FastAPI dependency that refuses a request without the API key, before the body is read."""
    bearer = HTTPBearer(auto_error=False, description="The key with which the server was started.")

    async def check(given: HTTPAuthorizationCredentials | None = Depends(bearer)) -> None:  # noqa: B008
        if given is None or not secrets.compare_digest(given.credentials.encode(), api_key.encode()):
            raise ApiError(401, "the header Authorization must be 'Bearer KEY' with the API key of this server",
                           code="invalid_api_key", headers={"www-authenticate": "Bearer", "connection": "close"})

    return check


def _captions(service: Service) -> APIRouter:
    router, limits = APIRouter(tags=["captions"]), service.limits
    pair = PairRequest.model_json_schema()
    form = {"type": "object", "required": ["before", "after"], "additionalProperties": False, "properties": {
        "before": {"type": "string", "format": "binary"}, "after": {"type": "string", "format": "binary"},
        "instruction": {"type": "string"}, "heat_map": {"type": "string", "enum": ["true", "false"]}}}
    bodies = {"application/json": {"schema": {"oneOf": [pair, {"type": "array", "items": pair, "minItems": 1,
                                                               "maxItems": limits.pairs}]}},
              "multipart/form-data": {"schema": form}}

    @router.post("/v1/captions", response_model=CaptionAnswer | list[CaptionAnswer],
                 openapi_extra={"requestBody": {"required": True, "content": bodies}})
    async def captions(request: Request) -> Response:
        """Describe what changed between two images, or between the images of each pair of a list.

        A JSON body has one pair or a list of pairs. A multipart body has one pair, as two files.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        is_list = False

        async def read(body: Body) -> list[Question]:
            nonlocal is_list
            if kind == "multipart/form-data":
                return [await form_question(body, limits)]
            if kind != "application/json":
                raise ApiError(415, "the content type must be application/json or multipart/form-data, got "
                               f"'{kind[:80]}'", code="unsupported_content_type", headers={"connection": "close"})
            questions, is_list = await service.in_thread(json_questions, await body.read(), limits)
            return questions

        answers = [answer.model_dump(exclude_unset=True) for answer in await service.answer(request, read)]
        return JSONResponse(answers if is_list else answers[0])

    return router


def _operation(service: Service) -> APIRouter:
    """Return the addresses for those who run the server. They never need the API key."""
    router = APIRouter(tags=["operation"])

    @router.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Answer as long as the process works."""
        return {"status": "ok"}

    @router.get("/readyz", response_model=Readiness, responses={503: {"model": Readiness}})
    async def readyz() -> JSONResponse:
        """Answer 200 if the server can take a request, and 503 while it loads a model or has no room."""
        version, ready = service.version, service.is_ready
        state = Readiness(ready=ready, version=version.name if version else None,
                          digest=version.digest if version else None, problem=service.problem)
        return JSONResponse(state.model_dump(), 200 if ready else 503)

    @router.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Answer the measurements of the server in the text format of Prometheus."""
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return router
