"""Sends requests to an OpenAI-compatible endpoint, with rate limits and retries.

The API key is removed from every text that is shown or stored.
"""

from __future__ import annotations

import email.utils
import json
import math
import os
import random
import re
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from onediff import interrupts
from onediff.config import Runtime
from onediff.data.writer.answers import Answer, excerpt, read_completion
from onediff.data.writer.request import Request, max_tokens

if TYPE_CHECKING:
    import openai

OPENAI_URL = "https://api.openai.com/v1"
TIMEOUT_S = 120.0  # for one attempt
ATTEMPTS = 8  # number of attempts per request; the pauses between them last about two minutes in all
BACKOFF_S, MAX_BACKOFF_S = 1.0, 60.0
KEY_NAMES, NO_KEY = ("ONEDIFF_WRITER_KEY", "OPENAI_API_KEY"), "none"
_FILTERED = ("content_filter", "content_policy_violation", "responsibleaipolicyviolation")


def shown_url(runtime: Runtime) -> str:
    """Return the URL of the endpoint without user name, password and query string, which may be secret."""
    return re.sub(r"(//)[^/@]*@|\?.*$", r"\1", runtime.writer_url or OPENAI_URL)


def api_key(runtime: Runtime) -> str:
    """Return the API key from the environment, or "none" if it is not set.

    Raises ValueError if the key is not set and the endpoint is OpenAI's own, which needs a key.
    """
    key = next(filter(None, (os.environ.get(name, "").strip() for name in KEY_NAMES)), NO_KEY)
    if key == NO_KEY and "api.openai.com" in (runtime.writer_url or OPENAI_URL):
        raise ValueError(f"{shown_url(runtime)}: this endpoint needs an API key, and none is set; set {KEY_NAMES[0]} "
                         "in the environment, or set writer_url in runtime.yaml to an endpoint that needs no key")
    return key


@dataclass
class Pace:
    """A rate limiter for requests and tokens per minute that spaces the requests evenly instead of allowing bursts."""

    requests_per_minute: float
    tokens_per_minute: float
    _next: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def turn(self, tokens: int) -> float:
        """Reserve the next free time for a request of at most `tokens` tokens, and return the seconds until then."""
        with self._lock:
            now = time.monotonic()
            start = max(now, self._next)
            self._next = start + max(60 / self.requests_per_minute, tokens * 60 / self.tokens_per_minute)
        return start - now


class Stop(interrupts.Stop):
    """A flag that asks threads to end; `reason` says why the threads must end, and is empty until then.

    `reason` is a plain attribute without a lock, because a signal handler must not wait for a lock.
    """

    def wait(self, seconds: float) -> bool:
        """Wait for at most `seconds`; return True at once when the threads are asked to end."""
        until = time.monotonic() + seconds
        while not self.reason and (rest := until - time.monotonic()) > 0:
            time.sleep(min(rest, 0.1))
        return bool(self.reason)


class Endpoint:
    """The client of one OpenAI-compatible endpoint; `share` processes divide the endpoint's rate limits equally."""

    def __init__(self, runtime: Runtime, stop: Stop, *, share: int = 1) -> None:
        import openai

        self.url, self.stop = shown_url(runtime), stop
        self._key = api_key(runtime)
        self._client = openai.OpenAI(api_key=self._key, base_url=runtime.writer_url or OPENAI_URL, max_retries=0,
                                     timeout=TIMEOUT_S)
        self._pace = Pace((runtime.writer_requests_per_minute or float("inf")) / share,
                          (runtime.writer_tokens_per_minute or float("inf")) / share)
        self._unsupported: set[str] = set()  # Request parameters that this endpoint has rejected.

    def answer(self, request: Request) -> Answer | None:
        """Send a request, and repeat it after temporary failures; return None if `stop` was set before an answer came.

        If an image cannot be decoded, the answer has the status "unreadable". Raises ValueError for errors that a retry
        cannot fix, and ConnectionError if all ATTEMPTS attempts failed.
        """
        try:
            body = request.body()
        except ValueError as error:
            return Answer(request.key, "unreadable", str(error), "", request.writer.model, 0, 0, counted=True)
        bound = max_tokens(request)
        lost, reason = 0, ""
        for attempt in range(ATTEMPTS):
            if self.stop.wait(self._pace.turn(bound.input + bound.output)):
                return None
            reply = self._attempt(request, body)
            if isinstance(reply, Answer):
                return replace(reply, lost=lost)
            lost, reason = lost + reply.lost, reply.reason
            backoff_s = min(MAX_BACKOFF_S, BACKOFF_S * 2 ** attempt) * random.uniform(0.5, 1)
            if attempt + 1 < ATTEMPTS and self.stop.wait(reply.wait_s or backoff_s):
                return None
        raise ConnectionError(f"{self.url}: no answer after {ATTEMPTS} attempts; the last attempt failed with: "
                              f"{reason}; all earlier answers are stored, so run the command again to continue")

    def _attempt(self, request: Request, body: dict[str, Any]) -> Answer | _Again:
        import openai

        sent = {name: value for name, value in body.items() if name not in self._unsupported}
        if "max_tokens" in self._unsupported:  # Newer OpenAI models call this parameter `max_completion_tokens`.
            sent["max_completion_tokens"] = body["max_tokens"]
        try:
            raw = self._client.chat.completions.with_raw_response.create(
                **sent, extra_headers={"Idempotency-Key": request.key})
            return self._read(request, self._hide(raw.text), raw.headers.get("content-type", ""))
        except openai.APITimeoutError:
            return _Again(f"no reply within {TIMEOUT_S:g} s", lost=1)
        except openai.APIConnectionError as error:
            never_sent = type(error.__cause__).__name__ in ("ConnectError", "ConnectTimeout")
            return _Again(self._hide(f"cannot connect ({error.__cause__ or error})"), lost=0 if never_sent else 1)
        except openai.APIStatusError as error:
            return self._on_http_error(request, sent, error)

    def _read(self, request: Request, text: str, content_type: str) -> Answer | _Again:
        try:
            completion = json.loads(text)
        except (ValueError, RecursionError):
            is_html = "html" in content_type or text.lstrip()[:9].lower().startswith(("<!doctype", "<html"))
            kind = "HTML" if is_html else content_type.split(";")[0] or "text"
            raise ValueError(f"{self.url}: the endpoint answered with {kind} instead of JSON: {self._excerpt(text)}; "
                             "set writer_url in runtime.yaml to the URL of the API, which usually ends in /v1"
                             ) from None
        return read_completion(request, completion) or _Again(f"not a chat completion: {self._excerpt(text)}")

    def _on_http_error(self, request: Request, body: dict[str, Any],
                       error: openai.APIStatusError) -> Answer | _Again:
        """Decide how to continue after an HTTP error: try again, store that this request was refused, or end the run.

        To end the run, it raises ValueError. This happens for errors that every other request would cause too.
        """
        status, text = error.status_code, error.response.text
        message = f"HTTP {status}: {self._excerpt(text)}"
        if status == 429 and "insufficient_quota" in text:
            raise ValueError(f"{self.url}: {message}; the account has no credit left: add credit, or set writer_url in "
                             "runtime.yaml to another endpoint")
        if status in (408, 409, 429) or status >= 500:
            return _Again(message, wait_s=_retry_after_s(error.response.headers.get("retry-after", "")))
        if status == 401:
            raise ValueError(f"{self.url}: HTTP 401: the endpoint rejects the API key; set {KEY_NAMES[0]} to a valid "
                             "key")
        if status == 400 and any(word in text.lower() for word in _FILTERED):
            return Answer(request.key, "refused", f"the endpoint's content filter refused: {self._excerpt(text)}", "",
                          request.writer.model, 0, 0, counted=True)
        # These parameters can be left out: the prompt also describes the JSON, and `max_tokens` has a newer name.
        for name in ("response_format", "max_tokens"):
            if status in (400, 422) and name in text and name in body:
                self._unsupported.add(name)
                return _Again(message, wait_s=0.001)
        raise ValueError(f"{self.url}: {message}; correct {request.section} in params.yaml or writer_url in "
                         "runtime.yaml")

    def _hide(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key != NO_KEY else text

    def _excerpt(self, text: str) -> str:
        return excerpt(self._hide(text), 160)


@dataclass(frozen=True)
class _Again:
    """The result of a failed attempt that should be repeated.

    `wait_s` is the pause in seconds that the endpoint asks for. `lost` is 1 if the attempt may have cost money although
    we got no answer, and otherwise 0.
    """

    reason: str
    wait_s: float | None = None
    lost: int = 0


def _retry_after_s(header: str) -> float | None:
    """Return the pause that a Retry-After header asks for, in seconds and at most ten minutes; None if it is invalid.

    The header contains a number of seconds or a date.
    """
    seconds = math.nan
    with suppress(ValueError, TypeError):
        seconds = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
    with suppress(ValueError):
        seconds = float(header)
    return None if math.isnan(seconds) else min(max(seconds, 0.001), 600.0)
