"""Sends requests: at a limited rate, repeated with back-off while that can help, and with the key hidden in all texts.
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
ATTEMPTS = 8  # about two minutes of waiting
BACKOFF_S, MAX_BACKOFF_S = 1.0, 60.0
KEY_NAMES, NO_KEY = ("ONEDIFF_WRITER_KEY", "OPENAI_API_KEY"), "none"
_FILTERED = ("content_filter", "content_policy_violation", "responsibleaipolicyviolation")


def shown_url(runtime: Runtime) -> str:
    """The endpoint's address without what may be secret in it: a password or a query."""
    return re.sub(r"(//)[^/@]*@|\?.*$", r"\1", runtime.writer_url or OPENAI_URL)


def api_key(runtime: Runtime) -> str:
    """From the environment. Raises ValueError if OpenAI itself is asked without one."""
    key = next(filter(None, (os.environ.get(name, "").strip() for name in KEY_NAMES)), NO_KEY)
    if key == NO_KEY and "api.openai.com" in (runtime.writer_url or OPENAI_URL):
        raise ValueError(f"no key for {shown_url(runtime)}: set {KEY_NAMES[0]} in the environment, or writer_url in "
                         "runtime.yaml to an endpoint that needs none")
    return key


@dataclass
class Pace:
    """Requests and tokens per minute, never in bursts: each request moves the next one's time on."""

    requests_per_minute: float
    tokens_per_minute: float
    _next: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def turn(self, tokens: int) -> float:
        """Seconds to wait before a request of at most so many tokens."""
        with self._lock:
            now = time.monotonic()
            start = max(now, self._next)
            self._next = start + max(60 / self.requests_per_minute, tokens * 60 / self.tokens_per_minute)
        return start - now


class Stop(interrupts.Stop):
    """Asks threads to end; `reason` is why. A plain attribute, because the handler of a signal may not wait for a lock.
    """

    def wait(self, seconds: float) -> bool:
        """Whether the end was asked for within so many seconds."""
        until = time.monotonic() + seconds
        while not self.reason and (rest := until - time.monotonic()) > 0:
            time.sleep(min(rest, 0.1))
        return bool(self.reason)


class Endpoint:
    """An OpenAI-compatible endpoint as one process reaches it. `share`: how many processes divide its rate limits."""

    def __init__(self, runtime: Runtime, stop: Stop, *, share: int = 1) -> None:
        import openai

        self.url, self.stop = shown_url(runtime), stop
        self._key = api_key(runtime)
        self._client = openai.OpenAI(api_key=self._key, base_url=runtime.writer_url or OPENAI_URL, max_retries=0,
                                     timeout=TIMEOUT_S)
        self._pace = Pace((runtime.writer_requests_per_minute or float("inf")) / share,
                          (runtime.writer_tokens_per_minute or float("inf")) / share)
        self._unsupported: set[str] = set()  # parameters that this endpoint refused

    def answer(self, request: Request) -> Answer | None:
        """None if `stop` was set before there was an answer; "unreadable" if an image cannot be sent.

        Raises ValueError where asking again cannot help, and ConnectionError after ATTEMPTS attempts.
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
        raise ConnectionError(f"{self.url}: no answer after {ATTEMPTS} attempts, the last: {reason}; what was answered "
                              "is kept, run again to go on")

    def _attempt(self, request: Request, body: dict[str, Any]) -> Answer | _Again:
        import openai

        sent = {name: value for name, value in body.items() if name not in self._unsupported}
        if "max_tokens" in self._unsupported:  # it has a newer name
            sent["max_completion_tokens"] = body["max_tokens"]
        try:
            raw = self._client.chat.completions.with_raw_response.create(
                **sent, extra_headers={"Idempotency-Key": request.key})
            return self._read(request, self._hide(raw.text), raw.headers.get("content-type", ""))
        except openai.APITimeoutError:
            return _Again(f"nothing came within {TIMEOUT_S:g} s", lost=1)
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
            raise ValueError(f"{self.url}: answered with {kind} instead of JSON: {self._excerpt(text)}; "
                             "set writer_url in runtime.yaml to the endpoint's address, mostly ending in /v1") from None
        return read_completion(request, completion) or _Again(f"not a chat completion: {self._excerpt(text)}")

    def _on_http_error(self, request: Request, body: dict[str, Any],
                       error: openai.APIStatusError) -> Answer | _Again:
        """An HTTP error: worth another attempt, a refusal of this one request, or the end (ValueError)."""
        status, text = error.status_code, error.response.text
        message = f"HTTP {status}: {self._excerpt(text)}"
        if status == 429 and "insufficient_quota" in text:
            raise ValueError(f"{self.url}: {message}; the account has no credit left")
        if status in (408, 409, 429) or status >= 500:
            return _Again(message, wait_s=_retry_after_s(error.response.headers.get("retry-after", "")))
        if status == 401:
            raise ValueError(f"{self.url}: HTTP 401: the key is not accepted; set {KEY_NAMES[0]} to a valid one")
        if status == 400 and any(word in text.lower() for word in _FILTERED):
            return Answer(request.key, "refused", f"the endpoint's content filter refused: {self._excerpt(text)}", "",
                          request.writer.model, 0, 0, counted=True)
        for name in ("response_format", "max_tokens"):  # the prompt describes the form as well
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
    """Why another attempt is needed; `lost` counts attempts that may have been billed without a reply."""

    reason: str
    wait_s: float | None = None
    lost: int = 0


def _retry_after_s(header: str) -> float | None:
    """Seconds that the endpoint asks for, as a number or as a date; at most ten minutes."""
    seconds = math.nan
    with suppress(ValueError, TypeError):
        seconds = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
    with suppress(ValueError):
        seconds = float(header)
    return None if math.isnan(seconds) else min(max(seconds, 0.001), 600.0)
