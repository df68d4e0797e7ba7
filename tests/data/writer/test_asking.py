"""Tests of a run of the writer: each request is sent once, within the budget, and every paid answer is stored."""

from __future__ import annotations

import os
import random
import resource
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from chat_server import KEY, ChatServer

from onediff.config import Runtime
from onediff.data.writer import answers as module
from onediff.data.writer.answers import read_answers, spent_usd
from onediff.data.writer.asking import ROUND, Budget, ask
from onediff.data.writer.request import Request, max_tokens

Asks = Callable[[int], Request]
PATH = Path("data/answers/mine/write.jsonl")


def test_every_distinct_request_is_sent_and_paid_once(server: ChatServer, runtime: Runtime, ask_about: Asks) -> None:
    server.failing = 0.1
    tally = ask([ask_about(number % 23) for number in range(61)], PATH, runtime)
    answers = read_answers(PATH)
    assert set(answers) == set(server.paid) == {ask_about(number).key for number in range(23)}
    assert set(server.paid.values()) == {1}
    assert tally.counts == {"ok": 23}
    assert (tally.input_tokens, tally.output_tokens) == (23 * 101, 23 * 11)
    assert tally.usd == pytest.approx(spent_usd()) == pytest.approx(23 * (101 * 10 + 11 * 100) / 1e6)
    assert KEY not in PATH.read_text()


def test_a_second_run_sends_nothing_and_needs_neither_price_nor_endpoint(server: ChatServer, runtime: Runtime,
                                                                         ask_about: Asks) -> None:
    requests = [ask_about(number) for number in range(5)]
    ask(requests, PATH, runtime)
    before, asked = PATH.read_bytes(), len(server.seen)
    assert ask(requests, PATH, Runtime()).counts == {}
    assert (PATH.read_bytes(), len(server.seen)) == (before, asked)


def test_refusals_and_malformed_answers_are_stored_and_not_requested_again(server: ChatServer, runtime: Runtime,
                                                                           ask_about: Asks) -> None:
    server.contents = {"room 1": "refuse", "room 2": "filter", "room 3": "no json", "room 4": "length"}
    requests = [ask_about(number) for number in range(1, 6)]
    for expected in ({"refused": 2, "malformed": 2, "ok": 1}, {}):
        assert ask(requests, PATH, runtime).counts == expected
    assert len(server.seen) == 5


def test_without_a_price_no_request_is_sent(server: ChatServer, runtime: Runtime, ask_about: Asks) -> None:
    unknown = runtime.model_copy(update={"writer_usd_per_million_output": None})
    with pytest.raises(ValueError, match="writer_usd_per_million_output is not set"):
        ask([ask_about(1)], PATH, unknown)
    assert not server.seen


def test_the_run_stops_before_the_budget_is_exceeded_and_stores_all_answers(server: ChatServer, runtime: Runtime,
                                                                            ask_about: Asks) -> None:
    cap = 3.5 * max_tokens(ask_about(1)).usd(runtime)
    capped = runtime.model_copy(update={"writer_max_usd": cap})
    with pytest.raises(ValueError, match=r"runtime.yaml: writer_max_usd .* cost .* USD .*; set writer_max_usd higher"):
        ask([ask_about(number) for number in range(50)], PATH, capped)
    kept = len(read_answers(PATH))
    assert 3 < kept < 50  # The answers cost less than their upper bound, so more than 3 of them fit in the budget.
    assert spent_usd() <= cap < spent_usd() + max_tokens(ask_about(1)).usd(runtime)
    assert len(server.seen) == kept
    with pytest.raises(ValueError, match="0 new answers"):
        ask([ask_about(number) for number in range(50)], Path("data/answers/other/write.jsonl"), capped)


def test_a_rejected_api_key_stops_the_run_and_all_earlier_answers_are_stored(server: ChatServer, runtime: Runtime,
                                                                             ask_about: Asks) -> None:
    one = runtime.model_copy(update={"writer_concurrency": 3})
    server.seconds = 0.1
    server.faults += ["", "", "", "", "401"]
    with pytest.raises(ValueError, match="HTTP 401: the endpoint rejects the API key"):
        ask([ask_about(number) for number in range(50)], PATH, one)
    assert len(read_answers(PATH)) == sum(server.paid.values()) == len(server.seen) - 1
    assert len(server.seen) <= 8


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_run_and_the_answers_in_flight_are_stored(server: ChatServer, runtime: Runtime,
                                                                     ask_about: Asks, number: int) -> None:
    server.seconds = 0.3
    threading.Timer(0.8, os.kill, (os.getpid(), number)).start()
    handler = signal.getsignal(number)
    with pytest.raises(InterruptedError, match=rf"{signal.Signals(number).name}: stopped after \d+ new answers"):
        ask([ask_about(each) for each in range(500)], PATH, runtime)
    assert signal.getsignal(number) is handler
    assert 0 < len(read_answers(PATH)) == sum(server.paid.values()) < 500


def test_the_number_of_concurrent_requests_is_limited(server: ChatServer, runtime: Runtime, ask_about: Asks) -> None:
    server.seconds, server.together = 0.1, 10
    ask([ask_about(number) for number in range(40)], PATH, runtime.model_copy(update={"writer_concurrency": 10}))
    assert server.most_flying == 10


def test_the_rate_limit_spaces_requests_evenly(server: ChatServer, runtime: Runtime, ask_about: Asks) -> None:
    ask([ask_about(number) for number in range(10)], PATH,
        runtime.model_copy(update={"writer_requests_per_minute": 1200.0}))
    gaps = [later - sooner for sooner, later in zip(sorted(server.times), sorted(server.times)[1:], strict=False)]
    assert sum(gaps) == pytest.approx(9 * 0.05, abs=0.15)


def test_without_free_disk_space_no_request_is_sent(server: ChatServer, runtime: Runtime, ask_about: Asks,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MIN_FREE_BYTES", 2**62)
    with pytest.raises(OSError, match="disk space are free, so no request is sent; free disk space"):
        ask([ask_about(1)], PATH, runtime)
    assert not server.seen


def test_a_full_disk_stops_the_run_and_the_next_run_continues(server: ChatServer, runtime: Runtime,
                                                              ask_about: Asks) -> None:
    requests = [ask_about(number) for number in range(40)]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    try:
        with pytest.raises(OSError, match="an answer could not be stored"):
            ask(requests, PATH, runtime)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert 0 < len(read_answers(PATH)) < 40
    assert PATH.read_bytes().endswith(b"}\n")
    ask(requests, PATH, runtime)
    assert len(read_answers(PATH)) == len(PATH.read_bytes().splitlines()) == 40
    assert set(server.paid.values()) == {1}


def test_spent_and_reserved_money_never_exceed_the_cap() -> None:
    generator, budget, flying = random.Random(3), Budget(cap=1.0, spent=0.25), []
    for number in range(500):
        if budget.reserve(str(number), generator.uniform(0.001, 0.1)):
            flying.append(str(number))
        if flying and generator.random() < 0.6:
            budget.spent += budget.reserved.pop(flying.pop(0)) * generator.random()
        assert budget.reserved.keys() == set(flying)
        assert budget.spent + sum(budget.reserved.values()) <= 1.0 + 1e-9
    assert budget.spent > 0.9


def test_a_free_endpoint_needs_no_budget(ask_about: Asks) -> None:
    free = Runtime(writer_usd_per_million_input=0.0, writer_usd_per_million_output=0.0)
    budget = Budget(cap=free.writer_max_usd, spent=0.0)
    requests = map(ask_about, range(100))
    assert all(budget.reserve(request.key, max_tokens(request).usd(free)) for request in requests)


@pytest.mark.slow
def test_a_ray_cluster_gives_the_same_answers(server: ChatServer, runtime: Runtime, ask_about: Asks) -> None:
    ray = pytest.importorskip("ray")
    requests = [ask_about(number) for number in range(97)]
    ask(requests, PATH, runtime)
    other = Path("data/answers/mine/ray.jsonl")
    clustered = runtime.model_copy(update={"engine": "ray", "writer_concurrency": 4})
    try:
        tally = ask(requests, other, clustered)
    finally:
        ray.shutdown()
    assert tally.counts == {"ok": 97}
    assert read_answers(other) == read_answers(PATH)
    assert set(server.paid.values()) == {1}
    assert len(requests) > 2 * 2 * ROUND**2  # So many requests need more than one round.
