"""The measurements that `GET /metrics` shows in the format of Prometheus."""

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 1, 2, 5, 10, 30)
_PAIRS = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """The measurements of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("onediff_requests", "Answered requests", ["path", "status"], registry=self.registry)
        self.seconds = Histogram("onediff_request_seconds", "Seconds from the start of a request to its answer",
                                 ["path"], buckets=_SECONDS, registry=self.registry)
        self.waiting = Gauge("onediff_waiting_pairs", "Pairs that wait for a caption or are being captioned",
                             registry=self.registry)
        self.batches = Histogram("onediff_batch_pairs", "Pairs that were captioned together", buckets=_PAIRS,
                                 registry=self.registry)
        self.captions = Counter("onediff_captions", "Captions, by what they say about a change", ["changed"],
                                registry=self.registry)
        self.loads = Counter("onediff_loads", "Attempts to load a model version", ["outcome"], registry=self.registry)
        self.version = Info("onediff_model", "The model version that writes the captions", registry=self.registry)


class MeasuredRequests:
    """ASGI middleware that counts requests, and measures the time until the answer is complete."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.perf_counter(), 500

        async def send_and_remember(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self.app(scope, receive, send_and_remember)
        finally:
            # Addresses that do not exist share one label, so that a client cannot create any number of labels.
            path = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(path, status).inc()
            self.metrics.seconds.labels(path).observe(time.perf_counter() - start)
