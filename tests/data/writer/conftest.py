"""Fixtures for tests of the writer: settings, and a local endpoint with very short pauses between attempts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from chat_server import KEY, ChatServer, serving

from onediff.config import Runtime, Writer
from onediff.data.writer import endpoint
from onediff.data.writer.request import Request, differences_from_captions


@pytest.fixture
def writer() -> Writer:
    return Writer(model="tiny-writer", mode="text", prompts="v1", temperature=0.7, max_tokens=61)


@pytest.fixture
def ask_about(writer: Writer) -> Callable[[int], Request]:
    """A function that returns the request for the pair with a given number."""
    return lambda number: differences_from_captions(f"mine-train-{number}", writer, before=f"room {number}",
                                                    after=f"garden {number}", edit="")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ChatServer]:
    """A running local endpoint; the test works in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ONEDIFF_WRITER_KEY", KEY)
    monkeypatch.setattr(endpoint, "BACKOFF_S", 0.01)
    with serving() as started:
        yield started


@pytest.fixture
def runtime(server: ChatServer) -> Runtime:
    return Runtime(writer_url=server.url, writer_max_usd=1.0, writer_usd_per_million_input=10.0,
                   writer_usd_per_million_output=100.0, workers=2)
