"""Sending: attempts that can help are made, others are not, and the key is nowhere to be seen."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from email.utils import formatdate

import pytest
from chat_server import KEY, ChatServer

from onediff.config import Runtime
from onediff.data.writer import endpoint as module
from onediff.data.writer.answers import Answer
from onediff.data.writer.endpoint import ATTEMPTS, Endpoint, Pace, Stop, api_key, shown_url
from onediff.data.writer.request import Request, differences_from_images, max_tokens

Asks = Callable[[int], Request]


def answer_of(runtime: Runtime, request: Request) -> Answer:
    answer = Endpoint(runtime, Stop()).answer(request)
    assert answer is not None
    return answer


def test_a_request_carries_the_api_key_and_an_idempotency_key(server: ChatServer, runtime: Runtime,
                                                              ask_about: Asks) -> None:
    answer = answer_of(runtime, ask_about(1))
    assert (answer.status, answer.key, answer.model) == ("ok", ask_about(1).key, "tiny-writer-dated")
    sent, = server.seen
    assert (sent["path"], sent["body"]) == ("/v1/chat/completions", ask_about(1).body())
    assert sent["headers"]["authorization"] == f"Bearer {KEY}"
    assert sent["headers"]["idempotency-key"] == ask_about(1).key


@pytest.mark.parametrize("fault", ["429", "500", "502", "503", "408", "html 502", "hang up", "not a completion"])
def test_temporary_failures_are_retried(server: ChatServer, runtime: Runtime, ask_about: Asks, fault: str) -> None:
    server.faults += [fault] * 3
    answer = answer_of(runtime, ask_about(1))
    assert answer.status == "ok"
    assert answer.lost == (3 if fault == "hang up" else 0)
    assert len(server.seen) == 4
    assert set(server.paid.values()) == {1}


def test_a_request_that_times_out_is_retried_and_counted_as_lost(server: ChatServer, runtime: Runtime, ask_about: Asks,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TIMEOUT_S", 0.5)
    server.faults.append("slow")
    answer = answer_of(runtime, ask_about(1))
    assert (answer.status, answer.lost, len(server.seen)) == ("ok", 1, 2)


@pytest.mark.parametrize("after", [lambda: "0.7", lambda: formatdate(time.time() + 2, usegmt=True)])
def test_the_retry_after_header_sets_the_pause(server: ChatServer, runtime: Runtime, ask_about: Asks,
                                               after: Callable[[], str]) -> None:
    server.faults.append(f"429 after={after()}")
    answer_of(runtime, ask_about(1))
    assert 0.7 <= server.times[1] - server.times[0] <= 2.5


def test_the_error_after_the_last_attempt_contains_the_reason(server: ChatServer, runtime: Runtime,
                                                              ask_about: Asks) -> None:
    server.faults += ["500 overloaded"] * ATTEMPTS
    with pytest.raises(ConnectionError, match=rf"no answer after {ATTEMPTS} attempts; .* with: HTTP 500: .*overload"):
        answer_of(runtime, ask_about(1))
    assert len(server.seen) == ATTEMPTS


def test_a_closed_port_is_an_error_that_contains_the_url(runtime: Runtime, ask_about: Asks,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ATTEMPTS", 2)
    closed = runtime.model_copy(update={"writer_url": "http://127.0.0.1:9/v1"})
    with pytest.raises(ConnectionError, match=r"http://127.0.0.1:9/v1: no answer after 2 attempts.*cannot connect"):
        answer_of(closed, ask_about(1))


@pytest.mark.parametrize(("fault", "message"), [
    ("401 your key " + KEY + " is wrong", "HTTP 401: the endpoint rejects the API key; set ONEDIFF_WRITER_KEY"),
    ("400 bad temperature " + KEY, "HTTP 400: .*bad temperature.*correct data.writer"),
    ("403 not you", "HTTP 403"), ("404 no such model", "HTTP 404: .*no such model"), ("422 what", "HTTP 422"),
    ("429 insufficient_quota", "the account has no credit left"),
    ("html", r"/v1: the endpoint answered with HTML instead of JSON: .*Bad Gateway.*; set writer_url"),
])
def test_permanent_failures_are_not_retried(server: ChatServer, runtime: Runtime, ask_about: Asks, fault: str,
                                            message: str) -> None:
    server.faults.append(fault)
    with pytest.raises(ValueError, match=message) as raised:
        answer_of(runtime, ask_about(1))
    assert len(server.seen) == 1
    assert KEY not in str(raised.value)
    assert server.url in str(raised.value)


def test_a_request_that_the_content_filter_rejects_is_stored_as_a_refusal(server: ChatServer, runtime: Runtime,
                                                                          ask_about: Asks) -> None:
    server.faults.append("400 content_policy_violation")
    answer = answer_of(runtime, ask_about(1))
    assert (answer.status, answer.input_tokens) == ("refused", 0)
    assert "content filter refused" in answer.reason


def test_parameters_that_the_endpoint_rejects_are_left_out(server: ChatServer, runtime: Runtime,
                                                           ask_about: Asks) -> None:
    server.faults += ["400 response_format is not supported", "400 use 'max_completion_tokens', not 'max_tokens'"]
    endpoint = Endpoint(runtime, Stop())
    assert all(endpoint.answer(ask_about(number)).status == "ok" for number in (1, 2))  # type: ignore[union-attr]
    assert len(server.seen) == 4
    assert [("response_format" in sent["body"], "max_tokens" in sent["body"],
             sent["body"].get("max_completion_tokens")) for sent in server.seen] == [
        (True, True, None), (False, True, None), (False, False, 61), (False, False, 61)]


def test_missing_token_counts_are_replaced_by_the_upper_bound(server: ChatServer, runtime: Runtime, ask_about: Asks,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    whole = server.completion
    monkeypatch.setattr(server, "completion", lambda body: whole(body) | {"usage": None})
    answer, most = answer_of(runtime, ask_about(1)), max_tokens(ask_about(1))
    assert (answer.counted, answer.input_tokens, answer.output_tokens) == (False, most.input, most.output)


def test_an_unreadable_image_is_not_sent(server: ChatServer, runtime: Runtime, ask_about: Asks) -> None:
    request = differences_from_images("a", ask_about(1).writer, before=b"no", after=b"no")
    assert answer_of(runtime, request).status == "unreadable"
    assert not server.seen


def test_no_answer_contains_the_api_key_even_if_the_endpoint_returns_it(server: ChatServer, runtime: Runtime,
                                                                        ask_about: Asks) -> None:
    server.contents = {"room 1": json.dumps({"differences": [f"my key is {KEY}"]}),
                       "room 2": "x" * 70 + KEY}
    for number, status in ((1, "ok"), (2, "malformed")):
        answer = answer_of(runtime, ask_about(number))
        assert answer.status == status
        assert KEY[:12] not in repr(answer)


def test_no_error_and_no_cause_of_an_error_contains_the_api_key(server: ChatServer, runtime: Runtime,
                                                                ask_about: Asks) -> None:
    import traceback

    server.faults += [f"500 {'x' * 100}{KEY}"] * ATTEMPTS
    with pytest.raises(ConnectionError) as raised:
        answer_of(runtime, ask_about(1))
    assert KEY[:12] not in "".join(traceback.format_exception(raised.value))


def test_only_the_endpoint_of_openai_needs_an_api_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in module.KEY_NAMES:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match=r"https://api.openai.com/v1: .* needs an API key, .*; set ONEDIFF_WRITER_KEY"):
        Endpoint(Runtime(), Stop())
    assert api_key(Runtime(writer_url="http://127.0.0.1:8000/v1")) == "none"
    monkeypatch.setenv("OPENAI_API_KEY", "second")
    assert api_key(Runtime()) == "second"
    monkeypatch.setenv("ONEDIFF_WRITER_KEY", " first\n")
    assert api_key(Runtime()) == "first"


@pytest.mark.parametrize(("url", "shown"), [("https://me:secret@host/v1?key=secret", "https://host/v1"),
                                            ("http://127.0.0.1:8000/v1", "http://127.0.0.1:8000/v1")])
def test_a_url_is_shown_without_password_and_query(url: str, shown: str) -> None:
    assert shown_url(Runtime(writer_url=url)) == shown


def test_requests_wait_long_enough_for_both_rate_limits() -> None:
    pace = Pace(requests_per_minute=600, tokens_per_minute=60_000)
    waits = [pace.turn(tokens) for tokens in (10, 10, 500, 10, 10)]
    assert waits == pytest.approx([0, 0.1, 0.2, 0.7, 0.8], abs=0.02)
    assert all(Pace(float("inf"), float("inf")).turn(1000) == 0 for _ in range(5))


def test_stop_ends_a_pause_at_once(server: ChatServer, runtime: Runtime, ask_about: Asks) -> None:
    server.faults.append("429 after=60")
    stop, started = Stop(), time.monotonic()
    threading.Timer(0.5, setattr, (stop, "reason", "SIGTERM")).start()
    assert Endpoint(runtime, stop).answer(ask_about(1)) is None
    assert time.monotonic() - started < 5
    assert Endpoint(runtime, stop).answer(ask_about(1)) is None
    assert len(server.seen) == 1
