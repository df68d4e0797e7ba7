"""Errors that the server answers, all in the JSON shape of OpenAI's API, without paths of the server or stack traces.

    {"error": {"message": "...", "type": "invalid_request_error", "param": "before", "code": "corrupt_image"}}
"""

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

CLIENT_GONE = 499  # the status with which nginx logs a request whose client closed the connection
_TYPES = {401: "authentication_error", 429: "rate_limit_error", 499: "invalid_request_error"}
_log = logging.getLogger("onediff.serve")


class ErrorDetail(BaseModel):
    """`param` names the wrong field of the request, and `code` the kind of error for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer with a status of 400 or more."""

    error: ErrorDetail


class ApiError(Exception):
    """A request that is refused, with the HTTP status of the answer.

    `code` names the kind of error for programs, and `param` the wrong field of the request.
    """

    def __init__(self, status: int, message: str, *, code: str, param: str | None = None,
                 headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.headers = status, code, param, headers


class ClientGoneError(Exception):
    """The client closed the connection before the answer was ready, so nobody reads the answer."""


def wrong_value(error: ValidationError, *, inside: str = "") -> ApiError:
    """Return the refusal of a JSON body that breaks the schema. The message has the first error that Pydantic found.

    `inside` is the place of the checked value in the body.
    """
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    param = ".".join([*filter(None, [inside]), *map(str, first["loc"])])
    if first["type"] == "json_invalid":
        return ApiError(422, f"the body is not valid JSON in UTF-8: {first['msg'].removeprefix('Invalid JSON: ')}",
                        code="invalid_json")
    message = first["msg"].removeprefix("Value error, ")
    return ApiError(422, f"{param or 'body'}: {message[:1].lower()}{message[1:]}", code="invalid_value",
                    param=param or None)


def add_error_handlers(app: FastAPI) -> None:
    """Let the application answer all errors in the shape of this module."""
    app.add_exception_handler(ApiError, _refused)
    app.add_exception_handler(HTTPException, _of_framework)
    app.add_exception_handler(ClientGoneError, _gone)
    app.add_exception_handler(ClientDisconnect, _gone)
    app.add_exception_handler(Exception, _unexpected)


def error_response(status: int, message: str, *, code: str, param: str | None = None,
                   headers: Mapping[str, str] | None = None) -> JSONResponse:
    """Return the response for an error, in the shape of this module."""
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    detail = ErrorDetail(message=message, type=kind, param=param, code=code)
    return JSONResponse(ErrorBody(error=detail).model_dump(), status, headers=headers)


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError), "FastAPI calls this handler for ApiError only"
    return error_response(error.status, str(error), code=error.code, param=error.param, headers=error.headers)


async def _of_framework(request: Request, error: Exception) -> Response:
    """Answer an error that the web framework found: an unknown address, or a method that the address does not have."""
    assert isinstance(error, HTTPException), "FastAPI calls this handler for HTTPException only"
    code, message = "http_error", str(error.detail)
    if error.status_code == 404:
        code, message = "not_found", "nothing is at this address; /docs lists the addresses of this server"
    elif error.status_code == 405:
        code = "method_not_allowed"
        message = f"this address takes {(error.headers or {}).get('Allow', 'GET')} only, got {request.method}"
    return error_response(error.status_code, message, code=code, headers=error.headers)


async def _gone(*_: Any) -> Response:
    return Response(status_code=CLIENT_GONE)


async def _unexpected(_: Request, error: Exception) -> Response:
    """Answer a bug of the server. uvicorn writes the stack trace to the log."""
    _log.error("a request failed because of an error in the server: %s", type(error).__name__)
    return error_response(500, "the server has an internal error; its log explains it", code="internal_error")
