"""Everything that has no answer yet is asked, within the cap, and each answer is on disk before the next is sent."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from onediff.config import Runtime
from onediff.data.parallel import spread
from onediff.data.writer.answer import Answer
from onediff.data.writer.endpoint import Endpoint, Stop, shown_url
from onediff.data.writer.price import Budget, Tokens, bound
from onediff.data.writer.request import Request
from onediff.data.writer.store import MIN_FREE_BYTES, Store, spent_usd
from onediff.interrupts import postponed

Outcome = tuple[str, Answer | BaseException | None]  # the request's key, with its answer, its error, or None: not asked
Send = Callable[[Iterator[Request]], Iterator[Outcome]]
ROUND = 4  # times as many requests as threads that a cluster's worker gets at once, and batches it gets in a round


@dataclass
class Tally:
    """What one run asked and paid; `usd` takes attempts without a reply at their most."""

    counts: dict[str, int] = field(default_factory=dict)
    input_tokens: int = 0
    output_tokens: int = 0
    usd: float = 0.0

    def add(self, answer: Answer, usd: float) -> None:
        self.counts[answer.status] = self.counts.get(answer.status, 0) + 1
        self.input_tokens += answer.input_tokens
        self.output_tokens += answer.output_tokens
        self.usd += usd

    def __str__(self) -> str:
        kinds = "".join(f", {count:,} {status}" for status, count in sorted(self.counts.items()))
        return (f"{sum(self.counts.values()):,} new answers{kinds}; {self.input_tokens:,} tokens in, "
                f"{self.output_tokens:,} out, {self.usd:.4f} USD")


def ask(requests: Iterable[Request], path: Path, runtime: Runtime) -> Tally:
    """Asks what `path` holds no answer to; answers of earlier runs cost nothing again.

    After SIGINT, SIGTERM or SIGHUP it sends nothing more, keeps the answers in flight and raises InterruptedError.
    Raises ValueError at the cap, for unknown prices and where the endpoint refuses, ConnectionError if it is out of
    reach, OSError on a full disk.
    """
    stop = Stop()
    with Store(path) as store, postponed(stop):
        todo = _unanswered(requests, store)
        first = next(todo, None)
        if first is None:
            return Tally()
        bound(first).usd(runtime)  # no price, no question
        send = _by_cluster(runtime) if runtime.engine == "ray" else _by_threads(Endpoint(runtime, stop), runtime)
        asking = _Asking(itertools.chain([first], todo), store, runtime, stop)
        with tqdm(desc=f"asking {shown_url(runtime)}", unit="answer") as shown:
            asking.everything(send, shown.update)
        if stop.reason:
            raise InterruptedError(f"{stop.reason}: stopped after {asking.tally}; kept in {path}, run again to go on")
    return asking.tally


def _unanswered(requests: Iterable[Request], store: Store) -> Iterator[Request]:
    seen = set(store.answers)
    for request in requests:
        if request.key not in seen:
            seen.add(request.key)
            yield request


class _Asking:
    """One run: rounds of requests. A round sends while the budget allows it; it ends when all that it sent is back."""

    def __init__(self, todo: Iterator[Request], store: Store, runtime: Runtime, stop: Stop) -> None:
        self.tally = Tally()
        self._todo, self._store, self._runtime, self._stop = todo, store, runtime, stop
        self._budget = Budget(runtime.writer_max_usd, spent_usd())
        self._reserved: dict[str, float] = {}
        self._held: Request | None = None  # the next one, which the budget did not allow yet
        self._done, self._sent = False, 0

    def everything(self, send: Send, progress: Callable[[], object]) -> None:
        """Raises the first error of a round, once all that was in flight is kept."""
        while not self._done and not self._stop.reason:
            sent, errors = self._sent, []
            for key, outcome in send(self._affordable()):
                error = self._keep(outcome, self._reserved.pop(key))
                if error is not None:
                    self._stop.reason = "error"
                    errors.append(error)
                progress()
            if errors:
                raise errors[0]
            if self._sent == sent and not self._done and not self._stop.reason:
                raise self._standstill()

    def _affordable(self) -> Iterator[Request]:
        while not self._stop.reason and self._store.has_room():
            request = self._held or next(self._todo, None)
            self._held, self._done = request, request is None
            if request is None:
                return
            usd = bound(request).usd(self._runtime)
            if not self._budget.reserve(usd):
                return
            self._held, self._sent, self._reserved[request.key] = None, self._sent + 1, usd
            yield request

    def _keep(self, outcome: Answer | BaseException | None, reserved: float) -> BaseException | None:
        if not isinstance(outcome, Answer):
            self._budget.settle(reserved=reserved, spent=0)
            return outcome
        usd = Tokens(outcome.input_tokens, outcome.output_tokens).usd(self._runtime) + outcome.lost * reserved
        self._budget.settle(reserved=reserved, spent=usd)
        try:
            self._store.append(outcome, usd=usd)
        except OSError as error:
            return error
        self.tally.add(outcome, usd)
        return None

    def _standstill(self) -> Exception:
        if self._held is None:
            return OSError(f"{self._store.path}: less than {MIN_FREE_BYTES >> 20} MiB are free on its disk, so nothing "
                           f"is asked; make room and run again. {self.tally}")
        usd = bound(self._held).usd(self._runtime)
        return ValueError(f"runtime.yaml: writer_max_usd {self._budget.cap:g}: {self._budget.spent:.4f} USD are spent "
                          f"(all of data/answers) and the next request may cost {usd:.4f}; set it higher. {self.tally}")


def _by_threads(endpoint: Endpoint, runtime: Runtime) -> Send:
    """From this process, as many at a time as the runtime says; the next is taken when one has come back."""
    count = runtime.writer_concurrency

    def send(requests: Iterator[Request]) -> Iterator[Outcome]:
        with ThreadPoolExecutor(count) as pool:
            flying: dict[Future[Answer | None], str] = {}
            for request in itertools.islice(requests, count):
                flying[pool.submit(endpoint.answer, request)] = request.key
            while flying:
                for future in wait(flying, return_when=FIRST_COMPLETED).done:
                    error = future.exception()
                    endpoint.stop.reason = endpoint.stop.reason or ("error" if error else "")
                    yield flying.pop(future), error or future.result()
                for request in itertools.islice(requests, count - len(flying)):
                    flying[pool.submit(endpoint.answer, request)] = request.key

    return send


def _by_cluster(runtime: Runtime) -> Send:
    """From the workers of a Ray cluster, which share concurrency and rate limits; this process alone keeps answers."""
    workers = min(runtime.num_workers, runtime.writer_concurrency)
    mine = runtime.model_copy(update={"workers": workers, "writer_concurrency": runtime.writer_concurrency // workers})
    make = functools.partial(_worker, mine, share=workers)

    def send(requests: Iterator[Request]) -> Iterator[Outcome]:
        wave = list(itertools.islice(requests, workers * mine.writer_concurrency * ROUND**2))
        size = mine.writer_concurrency * ROUND
        batches = [wave[start:start + size] for start in range(0, len(wave), size)]
        yield from itertools.chain.from_iterable(spread(make, batches, mine))

    return send


def _worker(runtime: Runtime, *, share: int) -> Callable[[list[Request]], list[Outcome]]:
    """The key comes from the environment of the machine that the worker is on: it never travels."""
    send = _by_threads(Endpoint(runtime, Stop(), share=share), runtime)
    return lambda batch: list(send(iter(batch)))
