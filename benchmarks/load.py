"""Clients for the benchmark of the server: a small HTTP client that costs little processor time, and requests."""

import asyncio
import base64
import io
import json
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import httpx
import numpy as np
from PIL import Image

HOST = "127.0.0.1"
SHOWN = 200  # characters of an answer that an error message shows


@dataclass(frozen=True)
class Message:
    """An encoded HTTP request. If `cut` is true, the client sends a half of it and closes the connection."""

    content: bytes
    cut: bool = False


@dataclass(frozen=True)
class Reply:
    """The status, the JSON body and the seconds until the answer was complete. The status of a cut request is 0."""

    status: int
    body: bytes
    seconds: float

    @property
    def caption(self) -> str:
        """Return the caption of an answer. Raises ValueError for an error."""
        if self.status != 200:
            raise ValueError(f"a request must get a caption, got status {self.status}: {self.body[:SHOWN]!r}")
        return str(json.loads(self.body)["caption"])


class Client:
    """One client with one connection, which it opens again if the server has closed it."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def send(self, message: Message) -> Reply:
        """Send a request and return the answer. Raises ConnectionError if the server closes the connection."""
        start = time.perf_counter()
        if self._streams and self._streams[0].at_eof():  # The server closes a connection that is idle for a long time.
            self.close()
        reader, writer = self._streams or await asyncio.open_connection(HOST, self._port, limit=2**24)
        self._streams = (reader, writer)
        if message.cut:
            writer.write(message.content[: len(message.content) // 2])
            await writer.drain()
            self.close()
            return Reply(0, b"", time.perf_counter() - start)
        # A server may refuse a body before it is complete, and close the connection.
        with suppress(ConnectionError):
            writer.write(message.content)
            await writer.drain()
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
        except asyncio.IncompleteReadError:
            self.close()
            raise ConnectionError("the server closed the connection without an answer") from None
        body = await reader.readexactly(int(head.partition(b"content-length:")[2].split(b"\r\n")[0]))
        if b"connection: close" in head:
            self.close()
        return Reply(int(head.split(b" ", 2)[1]), body, time.perf_counter() - start)

    def close(self) -> None:
        if self._streams:
            self._streams[1].transport.abort()
        self._streams = None


def form(before: bytes, after: bytes) -> Message:
    """Return a request with two image files in a multipart body."""
    return encoded(httpx.Request("POST", f"http://{HOST}/v1/captions", files={"before": before, "after": after}))


def json_body(body: object) -> Message:
    """Return a request with a JSON body."""
    return encoded(httpx.Request("POST", f"http://{HOST}/v1/captions", json=body))


def encoded(request: httpx.Request) -> Message:
    """Return the bytes of an httpx request."""
    body = request.read()
    lines = [f"{request.method} {request.url.raw_path.decode()} HTTP/1.1",
             *(f"{name}: {value}" for name, value in request.headers.items())]
    return Message("\r\n".join([*lines, "", ""]).encode() + body)


def bad_requests(good: Message, before: bytes) -> dict[str, Message]:
    """Return one request of each bad kind: corrupt, bomb, huge, wrong JSON and a cut connection."""
    head = f"POST /v1/captions HTTP/1.1\r\nhost: {HOST}\r\ncontent-type: application/json\r\ncontent-length: "
    return {"corrupt": form(before[: len(before) // 2], before), "bomb": form(bomb(), bomb()),
            "huge": Message(f"{head}{10**10}\r\n\r\n[".encode()),
            "wrong JSON": Message(f"{head}3\r\n\r\n[1}}".encode()),
            "cut connection": Message(good.content, cut=True)}


def bomb(megapixels: int = 64) -> bytes:
    """Return a PNG of some kilobytes with one bit per pixel and many pixels."""
    buffer = io.BytesIO()
    Image.new("1", (8000, megapixels * 125)).save(buffer, "PNG")
    return buffer.getvalue()


def base64_text(content: bytes) -> str:
    return base64.b64encode(content).decode()


async def closed_loop(port: int, messages: Sequence[Message], clients: int) -> list[Reply]:
    """Send all messages with a number of clients, each of which sends its next message after an answer.

    Return the answers in the order of the messages.
    """
    waiting = list(enumerate(messages))[::-1]
    replies: dict[int, Reply] = {}

    async def work() -> None:
        client = Client(port)
        while waiting:
            number, message = waiting.pop()
            replies[number] = await client.send(message)
        client.close()

    await asyncio.gather(*[work() for _ in range(clients)])
    return [replies[number] for number in range(len(messages))]


async def open_loop(port: int, messages: Sequence[Message], rate: float) -> list[Reply]:
    """Send the messages at random times, `rate` in a second on average, whether earlier ones were answered or not."""
    times = np.random.default_rng(0).exponential(1 / rate, len(messages)).cumsum()
    start, idle = time.perf_counter(), list[Client]()

    async def send(message: Message, at: float) -> Reply:
        await asyncio.sleep(at - (time.perf_counter() - start))
        client = idle.pop() if idle else Client(port)
        reply = await client.send(message)
        idle.append(client)
        return reply

    return await asyncio.gather(*[send(message, at) for message, at in zip(messages, times, strict=True)])
