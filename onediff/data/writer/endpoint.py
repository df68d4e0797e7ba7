"""How a request is sent: paced, repeated with back-off while that can help, and never with the key in sight."""

from __future__ import annotations

import email.utils
import json
import os
import random
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from onediff import interrupts
from onediff.config import Runtime
from onediff.data.writer.answer import Answer, read_completion
from onediff.data.writer.price import bound
from onediff.data.writer.request import Request

if TYPE_CHECKING:
    import openai

OPENAI_URL = "https://api.openai.com/v1"
TIMEOUT_S = 120.0  # for one attempt
ATTEMPTS = 8  # about two minutes of waiting
BACKOFF_S, MAX_BACKOFF_S = 1.0, 60.0
KEY_NAMES = ("ONEDIFF_WRITER_KEY", "OPENAI_API_KEY")
_FILTERED = ("content_filter", "content_policy_violation", "responsibleaipolicyviolation")


def shown_url(runtime: Runtime) -> str:
    """The endpoint's address without what may be secret in it: a password or a query."""
    return re.sub(r"(//)[^/@]*@|\?.*$", r"\1", runtime.writer_url or OPENAI_URL)


def api_key(runtime: Runtime) -> str:
    """From the environment. Raises ValueError if OpenAI itself is asked without one."""
    for name in KEY_NAMES:
        if os.environ.get(name, "").strip():
            return os.environ[name].strip()
    if "api.openai.com" in (runtime.writer_url or OPENAI_URL):
        raise ValueError(f"no key for {shown_url(runtime)}: set {KEY_NAMES[0]} in the environment, or writer_url in "
                         "runtime.yaml to an endpoint that needs none")
    return "none"


@dataclass
class Pace:
    """Requests and tokens per minute, never in bursts: each request moves the next one's time on."""

    requests_per_minute: float
    tokens_per_minute: float
    _next: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def turn(self, tokens: int) -> float:
        """Seconds to wait before a request that may take so many tokens."""
        with self._lock:
            now = time.monotonic()
            start = max(now, self._next)
            self._next = start + max(60 / self.requests_per_minute, tokens * 60 / self.tokens_per_minute)
        return start - now


class Stop(interrupts.Stop):
    """Asks threads to end, and says why. A plain attribute, because a signal's handler may not wait for a lock."""

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

        key = api_key(runtime)
        self.url = shown_url(runtime)
        self.stop = stop
        self._hide: Callable[[str], str] = lambda text: text.replace(key, "***") if key != "none" else text
        self._client = openai.OpenAI(api_key=key, base_url=runtime.writer_url or OPENAI_URL, max_retries=0,
                                     timeout=TIMEOUT_S)
        per_minute = [(limit or float("inf")) / share
                      for limit in (runtime.writer_requests_per_minute, runtime.writer_tokens_per_minute)]
        self._pace = Pace(per_minute[0], per_minute[1])
        self._left_out: set[str] = set()  # what this endpoint turned out not to know

    def answer(self, request: Request) -> Answer | None:
        """None if `stop` was set before there was an answer; "unreadable" if an image cannot be sent.

        Raises ValueError where asking again cannot help, and ConnectionError after ATTEMPTS attempts.
        """
        try:
            body = request.body()
        except ValueError as error:
            return Answer(request.key, "unreadable", str(error), "", request.writer.model, 0, 0, counted=True)
        tokens = bound(request)
        lost, reason = 0, ""
        for attempt in range(ATTEMPTS):
            if self.stop.wait(self._pace.turn(tokens.input + tokens.output)):
                return None
            reply = self._attempt(request, body)
            if isinstance(reply, Answer):
                return self._finished(reply, request, lost)
            lost, reason = lost + reply.lost, reply.reason
            if attempt + 1 < ATTEMPTS and self.stop.wait(reply.wait_s or _backoff(attempt)):
                return None
        raise ConnectionError(f"{self.url}: no answer after {ATTEMPTS} attempts, the last: {reason}; what was answered "
                              "is kept, run again to go on")

    def _attempt(self, request: Request, body: dict[str, Any]) -> Answer | _Again:
        import openai

        known = self._known(body)
        try:
            raw = self._client.chat.completions.with_raw_response.create(
                **known, extra_headers={"Idempotency-Key": request.key})
            return self._read(request, self._hide(raw.text), raw.headers.get("content-type", ""))
        except openai.APITimeoutError:
            return _Again(f"nothing came within {TIMEOUT_S:g} s", lost=1)
        except openai.APIConnectionError as error:
            never_sent = type(error.__cause__).__name__ in ("ConnectError", "ConnectTimeout")
            return _Again(self._hide(f"cannot connect ({error.__cause__ or error})"), lost=0 if never_sent else 1)
        except openai.APIStatusError as error:
            return self._refused(request, known, error)

    def _read(self, request: Request, text: str, kind: str) -> Answer | _Again:
        try:
            completion = json.loads(text)
        except (ValueError, RecursionError):
            raise ValueError(f"{self.url}: answered with {_kind(kind, text)} instead of JSON: {self._short(text)}; "
                             "set writer_url in runtime.yaml to the endpoint's address, mostly ending in /v1") from None
        answer = read_completion(request, completion) if isinstance(completion, dict) else None
        return answer or _Again(f"not a chat completion: {self._short(text)}")

    def _refused(self, request: Request, body: dict[str, Any], error: openai.APIStatusError) -> Answer | _Again:
        """An HTTP error: worth another attempt, a refusal of this one request, or the end (ValueError)."""
        status, text = error.status_code, error.response.text
        said = f"HTTP {status}: {self._short(text)}"
        if status == 429 and "insufficient_quota" in text:
            raise ValueError(f"{self.url}: {said}; the account has no credit left")
        if status in (408, 409, 429) or status >= 500:
            return _Again(said, wait_s=_retry_after(error.response.headers))
        if status == 401:
            raise ValueError(f"{self.url}: HTTP 401: the key is not accepted; set {KEY_NAMES[0]} to a valid one")
        if status == 400 and any(word in text.lower() for word in _FILTERED):
            return Answer(request.key, "refused", f"the endpoint's content filter refused: {self._short(text)}", "",
                          request.writer.model, 0, 0, counted=True)
        for name in ("response_format", "max_tokens"):
            if status in (400, 422) and name in text and name in body:
                self._left_out.add(name)
                return _Again(said, wait_s=0.001)
        raise ValueError(f"{self.url}: {said}; correct {request.section} in params.yaml or writer_url in runtime.yaml")

    def _known(self, body: dict[str, Any]) -> dict[str, Any]:
        """Without what the endpoint does not know: the prompts tell the form too, and max_tokens has a newer name."""
        known = {name: value for name, value in body.items() if name not in self._left_out}
        if "max_tokens" in self._left_out:
            known["max_completion_tokens"] = body["max_tokens"]
        return known

    def _finished(self, answer: Answer, request: Request, lost: int) -> Answer:
        if not answer.counted:
            most = bound(request)
            answer = replace(answer, input_tokens=most.input, output_tokens=most.output)
        return replace(answer, lost=lost)

    def _short(self, text: str) -> str:
        line = " ".join(self._hide(text).split())
        return repr(line if len(line) <= 160 else line[:157] + "...")


@dataclass(frozen=True)
class _Again:
    """Why another attempt is needed; `lost` counts attempts that may have been billed without a reply."""

    reason: str
    wait_s: float | None = None
    lost: int = 0


def _backoff(attempt: int) -> float:
    return min(MAX_BACKOFF_S, BACKOFF_S * 2 ** attempt) * random.uniform(0.5, 1)


def _retry_after(headers: Any) -> float | None:
    """Seconds that the endpoint asks for, as a number or as a date; at most ten minutes."""
    text = headers.get("retry-after", "")
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
        except (ValueError, TypeError):
            return None
    return min(max(seconds, 0.001), 600.0) if seconds == seconds else None


def _kind(content_type: str, text: str) -> str:
    looks_html = "html" in content_type or text.lstrip()[:9].lower().startswith(("<!doctype", "<html"))
    return "HTML" if looks_html else content_type.split(";")[0] or "text"
