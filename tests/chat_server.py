"""A local HTTP server with OpenAI's chat completions API, for tests: it can be slow and fail on request."""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

HTML = b"<!doctype html><html><title>502 Bad Gateway</title></html>"
KEY = "sk-secret-key-of-a-test-4711"


def judged(question: Any) -> dict[str, str]:
    """Judge a caption by a rule: it is true if it has all words of a reference, and partly true if it has half of them.

    Returns {} for a question that does not ask for a judgement.
    """
    if not isinstance(question, str) or "\nCaption: " not in question:
        return {}
    before, caption = question.removeprefix("References: ").split("\nCaption: ")
    caption_words = set(json.loads(caption).lower().split())
    references = [set(text.lower().split()) for text in json.loads(before)]
    best = max((len(caption_words & words) / len(words) for words in references), default=0)
    states = "yes" if best == 1 else "partly" if best >= 0.5 else "no"
    return {"states": states, "invents": "no" if best == 1 else "yes"}


class ChatServer(ThreadingHTTPServer):
    """A server that answers requests for differences, edits and judgements, each after `seconds`.

    `faults` lists how the next requests fail, one entry per request, such as "429", "html" or "hang up"; "" means no
    failure. When the list is empty, the share `failing` of the requests fails at random. No request is answered before
    `together` requests were in flight at the same time, or 60 seconds have passed. `paid` counts the billed
    answers by Idempotency-Key. If `honours_keys` is true, a repeated key is billed only once.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, *, port: int = 0, seconds: float = 0.0, failing: float = 0.0, honours_keys: bool = True,
                 seed: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.seconds, self.failing, self.honours_keys = seconds, failing, honours_keys
        self.faults: list[str] = []
        self.contents: dict[str, str] = {}  # text in a question -> answer to questions that contain the text
        self.paid: Counter[str] = Counter()
        self.given: dict[str, bytes] = {}  # Idempotency-Key -> answer
        self.seen: list[dict[str, Any]] = []  # all requests
        self.times: list[float] = []  # when the requests arrived
        self.failures = self.flying = self.most_flying = 0
        self.together = 0
        self.lock = threading.Lock()
        self._random = random.Random(seed)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def next_fault(self) -> str:
        with self.lock:
            if self.faults:
                return self.faults.pop(0)
            return self._random.choice(["429", "500"]) if self._random.random() < self.failing else ""

    def pay(self, key: str, body: dict[str, Any]) -> bytes:
        """Bill and return an answer; a key that was billed before is not billed again if the server honours keys."""
        with self.lock:
            if key in self.given and self.honours_keys:
                return self.given[key]
            self.paid[key] += 1
            self.given[key] = json.dumps(self.completion(body)).encode()
            return self.given[key]

    def completion(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return the JSON of the chat completion for a request."""
        asked = body["messages"][-1]["content"]
        question = json.dumps(asked)
        form = body.get("response_format", {}).get("json_schema", {}).get("name", "differences")
        good = {"differences": {"differences": [f"the second image differs in {len(question)} ways"]},
                "edit": {"edit": "make it snow", "output": "the same in snow"}, "judgement": judged(asked)}[form]
        content = next((text for part, text in self.contents.items() if part in question), json.dumps(good))
        message: dict[str, Any] = {"role": "assistant", "content": content}
        finish = "stop"
        if content in ("refuse", "filter", "length"):
            finish = {"filter": "content_filter", "length": "length"}.get(content, "stop")
            refusal = "I cannot help" if content == "refuse" else None
            message = {"role": "assistant", "content": None, "refusal": refusal}
        return {"id": "x", "object": "chat.completion", "model": body["model"] + "-dated",
                "choices": [{"index": 0, "message": message, "finish_reason": finish}],
                "usage": {"prompt_tokens": 101, "completion_tokens": 11, "total_tokens": 112}}

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print nothing about broken connections, because tests kill clients on purpose."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ChatServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        key = self.headers.get("Idempotency-Key", "")
        server = self.server
        with server.lock:
            headers = {name.lower(): value for name, value in self.headers.items()}
            server.seen.append({"path": self.path, "body": body, "headers": headers})
            server.times.append(time.monotonic())
            server.flying += 1
            server.most_flying = max(server.most_flying, server.flying)
        try:
            self._serve(key, body, server.next_fault())
        finally:
            with server.lock:
                server.flying -= 1

    def _serve(self, key: str, body: dict[str, Any], fault: str) -> None:
        server = self.server
        if fault:
            with server.lock:
                server.failures += 1
        if fault == "hang up":
            self.close_connection = True
            return
        if fault == "slow":
            time.sleep(1.5)
        if fault == "html":
            self._reply(200, HTML, "text/html")
        elif fault == "html 502":
            self._reply(502, HTML, "text/html")
        elif fault == "not a completion":
            self._reply(200, b'{"error": {"message": "provider is busy"}}')
        elif fault.split()[:1] and fault.split()[0].isdigit():
            code, _, text = fault.partition(" ")
            headers = {"Retry-After": text.removeprefix("after=")} if text.startswith("after=") else {}
            error = {"error": {"message": text or "failed", "code": text}}
            self._reply(int(code), json.dumps(error).encode(), headers=headers)
        else:
            deadline = time.monotonic() + 60
            while server.most_flying < server.together and time.monotonic() < deadline:
                time.sleep(0.01)
            content = server.pay(key, body)  # Bill first: a client that disconnects before the reply must pay too.
            time.sleep(server.seconds)
            self._reply(200, content)

    def _reply(self, status: int, content: bytes, kind: str = "application/json",
               headers: dict[str, str] | None = None) -> None:
        try:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)
        except (BrokenPipeError, ConnectionResetError):
            pass

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def serving(**settings: Any) -> Iterator[ChatServer]:
    """Run a server on a free port in a thread until the end of the `with` block."""
    with ChatServer(**settings) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
