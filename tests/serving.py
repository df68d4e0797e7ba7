"""A running server with a small model, and image files and request bodies for tests of the server."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from PIL import Image

from onediff.config import Serve
from onediff.model.captioner import Captioner
from onediff.ops.serving import claims_change
from onediff.serve.http.app import create_app
from onediff.serve.http.captioning import Version
from onediff.serve.http.port import listener
from onediff.serve.http.server import Server, server_of
from onediff.serve.http.service import Service


class HeldCaptioner(Captioner):
    """A captioner that waits before each batch until the test releases it, and counts its pairs."""

    def __init__(self, original: Captioner) -> None:
        super().__init__(original.model, original.processor)
        self.may_start, self.batches = threading.Event(), list[int]()

    def caption_with_confidence(self, pairs: list, **options: Any) -> list[tuple[str, float]]:
        self.batches.append(len(pairs))
        assert self.may_start.wait(30)
        return super().caption_with_confidence(pairs, **options)


@dataclass(frozen=True)
class RunningServer:
    """The address of a server that runs in a thread of the test, and its service."""

    url: str
    service: Service


@contextmanager
def running_server(captioner: Captioner, limits: Serve, *, api_key: str | None = None,
                   current: Callable[[], str] = lambda: "1",
                   load: Callable[[str], Version] | None = None) -> Iterator[RunningServer]:
    """Run a server on a free port during the `with` block, and wait until its model is loaded."""
    service = Service(limits, current=current, load=load or (lambda name: version(captioner, name)))
    with running_app(create_app(service, api_key=api_key)) as server:
        wait_until(lambda: service.version is not None)
        yield RunningServer("http://127.0.0.1:{1}".format(*server.servers[0].sockets[0].getsockname()), service)


@contextmanager
def running_app(app: FastAPI, *, keep_alive_s: int = 75) -> Iterator[Server]:
    """Run an application on a free port, in a thread, during the `with` block."""
    server = server_of(app)
    server.config.timeout_keep_alive = keep_alive_s
    with listener("127.0.0.1", 0) as opened:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]})
        thread.start()
        try:
            wait_until(lambda: server.started)
            yield server
        finally:
            server.should_exit = True
            thread.join()


def version(captioner: Captioner, name: str = "1") -> Version:
    """Return a loaded version with this name."""
    return Version(name, name[:1] * 64, captioner, claims_change)


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    """Wait until the condition is true, and fail after some seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true"
        time.sleep(0.01)


@pytest.fixture(scope="session")
def served_captioner(untrained: Path) -> Captioner:
    """A captioner with random weights between the committed backbones, whose captions have at least one word."""
    captioner = Captioner.load(untrained, device="cpu")
    end = captioner.processor.tokenizer.eos_token_id
    captioner.model.language.generation_config.begin_suppress_tokens = [end]
    return captioner


@pytest.fixture(scope="session")
def server(served_captioner: Captioner) -> Iterator[RunningServer]:
    """A server that all tests share. Do not change its service."""
    with running_server(served_captioner, Serve()) as started:
        yield started


@pytest.fixture
def client(server: RunningServer) -> Iterator[httpx.Client]:
    """An HTTP client of the shared server."""
    with httpx.Client(base_url=server.url, timeout=30, trust_env=False) as opened:
        yield opened


def image_file(seed: int = 0, *, size: tuple[int, int] = (96, 72), form: str = "PNG") -> bytes:
    """Return an image file of coloured rectangles."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    small.resize(size, Image.Resampling.NEAREST).save(buffer, form)
    return buffer.getvalue()


def base64_text(content: bytes) -> str:
    return base64.b64encode(content).decode()


def pair_body(first: int = 0, second: int = 1) -> dict[str, str]:
    """Return the JSON body of a request with two images that `image_file` makes from these seeds."""
    return {"before": base64_text(image_file(first)), "after": base64_text(image_file(second))}
