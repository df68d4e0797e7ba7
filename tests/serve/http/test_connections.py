"""Tests of connections whose clients are slow, against a real server with an application that needs no model."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse
from serving import running_app, wait_until

from onediff.serve.http import connections, port
from onediff.serve.http.server import Server

GET = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n"
WAIT = b"POST /wait HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\n\r\n"
LARGE = b"GET /large HTTP/1.1\r\nhost: a\r\n\r\n"
LATE = b"GET /late HTTP/1.1\r\nhost: a\r\n\r\n"
LARGE_BYTES = 30_000_000  # more than the buffers of the operating system hold


@pytest.fixture
def app() -> FastAPI:
    """An application with a short answer, a large answer, a late large answer, and an answer after half a second."""
    app = FastAPI()

    @app.get("/")
    def short() -> PlainTextResponse:
        return PlainTextResponse("short")

    @app.get("/large")
    def large() -> PlainTextResponse:
        return PlainTextResponse(bytes(LARGE_BYTES))

    @app.get("/late")
    async def late() -> PlainTextResponse:
        await asyncio.sleep(1.5)
        return PlainTextResponse(bytes(LARGE_BYTES))

    @app.post("/wait")
    async def wait(request: Request) -> PlainTextResponse:
        body = await request.body()
        await asyncio.sleep(0.5)
        return PlainTextResponse(body)

    return app


@contextmanager
def connected(server: Server, *, receive_buffer: int | None = None) -> Iterator[socket.socket]:
    """Connect to the server. A small `receive_buffer` lets the server notice soon that the client reads nothing."""
    with socket.socket() as client:
        if receive_buffer is not None:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        client.settimeout(20)
        client.connect(server.servers[0].sockets[0].getsockname())
        yield client


def received(client: socket.socket) -> bytes:
    """Return everything that the server sends until it closes the connection."""
    pieces = []
    try:
        while piece := client.recv(65536):
            pieces.append(piece)
    except ConnectionResetError:
        pass
    return b"".join(pieces)


@pytest.mark.parametrize("start", [b"", GET[:9], GET[:-2], GET + GET[:9]],
                         ids=["nothing", "half a line", "headers without an end", "half of a second request"])
def test_a_connection_ends_if_no_complete_headers_arrive(app: FastAPI, start: bytes) -> None:
    with running_app(app, keep_alive_s=1) as server, connected(server) as client:
        client.sendall(start)
        client.settimeout(0.05)
        begin, answer, last = time.monotonic(), b"", b"-"
        while last and time.monotonic() < begin + 10:
            if start:
                client.sendall(b"x")  # uvicorn stopped its timer at each byte.
            try:
                last = client.recv(65536)
            except TimeoutError:
                continue
            except ConnectionResetError:
                break
            answer += last
        assert 0.9 < time.monotonic() - begin < 8
        assert answer.count(b"200 OK") == start.count(GET)


def test_a_client_that_reads_nothing_loses_its_connection(app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(port, "READ_S", 1)
    with running_app(app) as server, connected(server, receive_buffer=4096) as client:
        client.sendall(LARGE)
        wait_until(lambda: bool(server.server_state.connections))
        wait_until(lambda: not server.server_state.connections)
        assert len(received(client)) < LARGE_BYTES


def test_a_slow_client_does_not_delay_the_end_of_the_server(app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "LAST_S", 1)
    with (running_app(app) as server, connected(server) as silent, connected(server) as half, connected(server) as slow,
          connected(server, receive_buffer=4096) as unread, connected(server, receive_buffer=4096) as late,
          connected(server) as good):
        half.sendall(GET[:9])
        slow.sendall(WAIT + b"1")
        unread.sendall(LARGE)
        late.sendall(LATE)
        good.sendall(WAIT + b"123")
        wait_until(lambda: len(server.server_state.tasks) == 4)
        begin = time.monotonic()
        server.should_exit = True
        assert received(good).endswith(b"123")
        assert [received(client) for client in (silent, half, slow)] == [b""] * 3
        wait_until(lambda: not server.server_state.connections)
        assert time.monotonic() - begin < 5
        assert max(len(received(client)) for client in (unread, late)) < LARGE_BYTES
