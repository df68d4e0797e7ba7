from __future__ import annotations

import gc
import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import HeldCaptioner, RunningServer, image_file, pair_body, running_server, version, wait_until

from onediff.config import Serve
from onediff.model.captioner import Captioner
from onediff.serve.http.captioning import Version
from onediff.serve.usage_log import UsageLog

POISON_PX = 61  # An image of this width makes a PickyCaptioner fail.


class PickyCaptioner(Captioner):
    """A captioner that fails for a batch with an image of a certain width."""

    def caption_with_confidence(self, pairs: list, **options: Any) -> list[tuple[str, float]]:
        if any(before.width == POISON_PX for before, _ in pairs):
            raise RuntimeError("/secret/path of the server")
        return super().caption_with_confidence(pairs, **options)


@contextmanager
def held_server(captioner: Captioner, limits: Serve) -> Iterator[tuple[RunningServer, HeldCaptioner]]:
    """Run a server whose first batch is held until the test releases it."""
    held = HeldCaptioner(captioner)
    with running_server(held, limits) as server:
        try:
            yield server, held
        finally:
            held.may_start.set()


def post(server: RunningServer, body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/captions", json=body, timeout=30, trust_env=False)


def waiting(server: RunningServer) -> float:
    lines = httpx.get(f"{server.url}/metrics", trust_env=False).text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("onediff_waiting_pairs"))


def test_pairs_of_different_clients_are_captioned_together(served_captioner: Captioner) -> None:
    with held_server(served_captioner, Serve()) as (server, held), ThreadPoolExecutor() as clients:
        first = clients.submit(post, server, pair_body())
        wait_until(lambda: held.batches == [1])
        others = [clients.submit(post, server, pair_body(seed, seed + 1)) for seed in range(3)]
        others.append(clients.submit(post, server, [pair_body(7, 8), pair_body() | {"instruction": "word " * 300}]))
        wait_until(lambda: waiting(server) == 6)
        held.may_start.set()
        assert [answer.result().status_code for answer in (first, *others)] == [200, 200, 200, 200, 422]
        assert held.batches == [1, 4]


def test_a_client_that_goes_away_costs_no_caption(served_captioner: Captioner,
                                                  caplog: pytest.LogCaptureFixture) -> None:
    with held_server(served_captioner, Serve()) as (server, held), ThreadPoolExecutor() as clients:
        first = clients.submit(post, server, pair_body())
        wait_until(lambda: held.batches == [1])
        body = json.dumps(pair_body()).encode()
        port = int(server.url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as gone:
            gone.sendall(b"POST /v1/captions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
                         b"content-length: %d\r\n\r\n%b" % (len(body), body))
            wait_until(lambda: waiting(server) == 2)
        wait_until(lambda: waiting(server) == 1)
        held.may_start.set()
        assert first.result().status_code == post(server, pair_body()).status_code == 200
        assert held.batches == [1, 1]
    gc.collect()  # asyncio logs an error that nobody handled when it frees the future.
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_a_full_queue_refuses_and_is_not_ready(served_captioner: Captioner) -> None:
    limits = Serve(pairs=2, waiting_pairs=2)
    with held_server(served_captioner, limits) as (server, held), ThreadPoolExecutor() as clients:
        first = clients.submit(post, server, [pair_body(), pair_body()])
        wait_until(lambda: waiting(server) == 2)
        refused = post(server, pair_body())
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "server_busy")
        assert httpx.get(f"{server.url}/readyz", trust_env=False).status_code == 503
        held.may_start.set()
        assert first.result().status_code == 200
        assert httpx.get(f"{server.url}/readyz", trust_env=False).status_code == 200


def test_a_caption_that_takes_too_long_is_given_up(served_captioner: Captioner) -> None:
    with held_server(served_captioner, Serve(timeout_s=0.3)) as (server, _):
        late = post(server, pair_body())
        assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")


def test_a_pair_that_the_model_cannot_caption_harms_no_other_pair(served_captioner: Captioner) -> None:
    picky = PickyCaptioner(served_captioner.model, served_captioner.processor)
    with running_server(picky, Serve(batch_wait_ms=200)) as server, ThreadPoolExecutor() as clients:
        poison = {"before": image_file(size=(POISON_PX, 50)), "after": image_file()}
        bad = clients.submit(httpx.post, f"{server.url}/v1/captions", files=poison, trust_env=False)
        good = [clients.submit(post, server, pair_body()) for _ in range(3)]
        assert [answer.result().status_code for answer in good] == [200] * 3
        assert bad.result().status_code == 500
        assert "secret" not in bad.result().text


def test_a_new_version_takes_over_and_no_request_fails(served_captioner: Captioner) -> None:
    names = ["1"]
    with running_server(served_captioner, Serve(poll_s=0.05), current=lambda: names[0]) as server:
        stop, statuses = threading.Event(), list[int]()

        def work() -> None:
            while not stop.is_set():
                statuses.append(post(server, pair_body()).status_code)

        with ThreadPoolExecutor(3) as clients:
            tasks = [clients.submit(work) for _ in range(3)]
            for name in ("2", "3"):
                names[0] = name
                wait_until(lambda name=name: post(server, pair_body()).json()["model"]["version"] == name)
            stop.set()
        assert [task.result() for task in tasks] == [None] * 3
    assert set(statuses) == {200}


def test_a_version_that_cannot_be_loaded_leaves_the_old_one_serving(
        served_captioner: Captioner, caplog: pytest.LogCaptureFixture) -> None:
    names = ["1"]

    def load(name: str) -> Version:
        if name == "2":
            raise ValueError("/secret/path: the weights cannot be read")
        return version(served_captioner, name)

    with running_server(served_captioner, Serve(poll_s=0.05), current=lambda: names[0], load=load) as server:
        def problem() -> str | None:
            answer = httpx.get(f"{server.url}/readyz", trust_env=False)
            assert answer.status_code == 200
            return answer.json()["problem"]

        assert problem() is None
        names[0] = "2"
        wait_until(lambda: problem() is not None)
        assert problem() == ("version 2 cannot be loaded, so version 1 continues to serve; the log of the server "
                             "explains it")
        assert post(server, pair_body()).json()["model"]["version"] == "1"
        assert caplog.text.count("/secret/path: the weights cannot be read") == 1
        caplog.set_level("INFO", "onediff.serve")
        names[0] = "1"
        wait_until(lambda: problem() is None)
        assert "the problem is over: version 1 should serve, and serves" in caplog.text


def test_a_registry_that_goes_away_is_logged_once_and_the_server_follows_it_again_later(
        served_captioner: Captioner, caplog: pytest.LogCaptureFixture) -> None:
    names, asked = ["1"], list[str]()

    def current() -> str:
        asked.extend(names)
        if not names:
            asked.append("nothing")
            raise ConnectionError("the registry does not answer")
        return names[0]

    caplog.set_level("INFO", "onediff.serve")
    with running_server(served_captioner, Serve(poll_s=0.02), current=current) as server:
        names.clear()
        wait_until(lambda: asked.count("nothing") == 3)
        assert post(server, pair_body()).json()["model"]["version"] == "1"
        assert server.service.is_ready
        names.append("2")
        wait_until(lambda: server.service.version is not None and server.service.version.name == "2")
        assert server.service.problem is None
    assert caplog.text.count("cannot find out which version should serve, so version 1 continues to serve: "
                             "the registry does not answer") == caplog.text.count("continues to serve") == 1


def test_captions_are_written_to_the_usage_log(served_captioner: Captioner, tmp_path: Path) -> None:
    log = UsageLog(tmp_path / "usage", "models:/onediff/1", "w" * 64, keep_images=True)
    with running_server(served_captioner, Serve(),
                        load=lambda name: replace(version(served_captioner, name), usage_log=log)) as server:
        answers = post(server, [pair_body(), pair_body(3, 5) | {"instruction": "How was the image edited?"}]).json()
        path = log.folder
        wait_until(lambda: any(path.glob("*.jsonl")))
    rows = [json.loads(line) for file in path.glob("*.jsonl") for line in file.read_text().splitlines()]
    assert [row["caption"] for row in rows] == [answer["caption"] for answer in answers]
    assert rows[1]["instruction"] == "How was the image edited?"
    assert (path / rows[0]["file_before"]).read_bytes() == image_file(0)
