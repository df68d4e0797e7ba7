"""Asks every request that has no answer yet, within the cap, and stores each answer before the next request is sent."""

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path

from tqdm import tqdm

from onediff.config import Config, Runtime
from onediff.data.parallel import spread
from onediff.data.writer.answers import (
    MIN_FREE_BYTES,
    Answer,
    answers_path,
    append,
    has_room,
    open_answers,
    read_answers,
    spent_usd,
)
from onediff.data.writer.endpoint import Endpoint, Stop, shown_url
from onediff.data.writer.jobs import Stage, jobs
from onediff.data.writer.request import Request, Tokens, max_tokens
from onediff.interrupts import postponed

Outcome = tuple[str, Answer | BaseException | None]  # the request's key, with its answer, its error, or None: not sent
Send = Callable[[Iterator[Request]], Iterator[Outcome]]
ROUND = 4  # times as many requests as threads that a cluster's worker gets at once, and batches it gets in a round


@dataclass
class Tally:
    """The answers and the cost of one run; `usd` counts attempts without a reply at their maximum."""

    counts: Counter[str] = field(default_factory=Counter)
    input_tokens: int = 0
    output_tokens: int = 0
    usd: float = 0.0

    def __str__(self) -> str:
        kinds = "".join(f", {count:,} {status}" for status, count in sorted(self.counts.items()))
        return (f"{sum(self.counts.values()):,} new answers{kinds}; {self.input_tokens:,} tokens in, "
                f"{self.output_tokens:,} out, {self.usd:.4f} USD")


@dataclass
class Budget:
    """Dollars: `spent` are gone, `reserved` could be taken by the requests in flight; all together stay below `cap`."""

    cap: float
    spent: float
    reserved: dict[str, float] = field(default_factory=dict)  # by the key of the request

    def reserve(self, key: str, usd: float) -> bool:
        """Whether a request that costs at most `usd` may be sent."""
        if self.spent + sum(self.reserved.values()) + usd > self.cap:
            return False
        self.reserved[key] = usd
        return True


def ask_for_stage(source: str, config: Config, runtime: Runtime, stage: Stage) -> dict[str, Answer]:
    """Asks what a stage needs of the writer, prints the cost, and returns all answers. Raises as `ask` does."""
    path = answers_path(source, stage)
    print(ask((job for job in jobs(source, config, stage) if isinstance(job, Request)), path, runtime))
    return read_answers(path)


def ask(requests: Iterable[Request], path: Path, runtime: Runtime) -> Tally:
    """Asks what `path` holds no answer to; answers of earlier runs cost nothing again.

    After SIGINT, SIGTERM or SIGHUP it sends nothing more, keeps the answers in flight and raises InterruptedError.
    Raises ValueError at the cap, for unknown prices and where the endpoint refuses, ConnectionError if it is out of
    reach, OSError on a full disk.
    """
    stop = Stop()
    with open_answers(path) as file, postponed(stop):
        unanswered = _unanswered(requests, set(read_answers(path)))
        first = next(unanswered, None)
        if first is None:
            return Tally()
        max_tokens(first).usd(runtime)  # without a price nothing is sent
        send = (functools.partial(_send_by_cluster, runtime) if runtime.engine == "ray" else
                functools.partial(_send_by_threads, Endpoint(runtime, stop), runtime.writer_concurrency))
        run = _Run(itertools.chain([first], unanswered), file, runtime, stop)
        with tqdm(desc=f"asking {shown_url(runtime)}", unit="answer") as progress:
            run.ask_all(send, progress.update)
        if stop.reason:
            raise InterruptedError(f"{stop.reason}: stopped after {run.tally}; kept in {path}, run again to go on")
    return run.tally


def _unanswered(requests: Iterable[Request], keys: set[str]) -> Iterator[Request]:
    for request in requests:
        if request.key not in keys:
            keys.add(request.key)
            yield request


class _Run:
    """Rounds of requests. A round sends while the budget allows it, and ends when all that it sent has come back."""

    def __init__(self, requests: Iterator[Request], file: FileIO, runtime: Runtime, stop: Stop) -> None:
        self.tally = Tally()
        self._requests, self._file, self._runtime, self._stop = requests, file, runtime, stop
        self._budget = Budget(runtime.writer_max_usd, spent_usd())
        self._is_finished = False

    def ask_all(self, send: Send, progress: Callable[[], object]) -> None:
        """Raises the first error of a round, once all answers in flight are stored."""
        while not self._is_finished and not self._stop.reason:
            errors, is_idle = [], True
            for key, outcome in send(self._affordable()):
                is_idle = False
                error = self._store(outcome, self._budget.reserved.pop(key))
                if error is not None:
                    self._stop.reason = "error"
                    errors.append(error)
                progress()
            if errors:
                raise errors[0]
            if is_idle and not self._is_finished and not self._stop.reason:
                raise self._blocked()

    def _affordable(self) -> Iterator[Request]:
        while not self._stop.reason and has_room(self._file):
            request = next(self._requests, None)
            if request is None:
                self._is_finished = True
                return
            usd = max_tokens(request).usd(self._runtime)
            if not self._budget.reserve(request.key, usd):
                self._requests = itertools.chain([request], self._requests)  # for the next round
                return
            yield request

    def _store(self, outcome: Answer | BaseException | None, reserved: float) -> BaseException | None:
        if not isinstance(outcome, Answer):
            return outcome
        usd = Tokens(outcome.input_tokens, outcome.output_tokens).usd(self._runtime) + outcome.lost * reserved
        self._budget.spent += usd
        try:
            append(outcome, self._file, usd=usd)
        except OSError as error:
            return error
        self.tally.counts[outcome.status] += 1
        self.tally.input_tokens += outcome.input_tokens
        self.tally.output_tokens += outcome.output_tokens
        self.tally.usd += usd
        return None

    def _blocked(self) -> Exception:
        """Why nothing can be sent: the disk is full, or the budget does not allow the next request."""
        if not has_room(self._file):
            return OSError(f"{self._file.name}: less than {MIN_FREE_BYTES >> 20} MiB are free on its disk, so "
                           f"nothing is asked; free some space and run the same command again. {self.tally}")
        usd = max_tokens(next(self._requests)).usd(self._runtime)
        return ValueError(f"runtime.yaml: writer_max_usd {self._budget.cap:g}: {self._budget.spent:.4f} USD are spent "
                          f"(all of data/answers) and the next request may cost {usd:.4f}; set it higher. {self.tally}")


def _send_by_threads(endpoint: Endpoint, num_threads: int, requests: Iterator[Request]) -> Iterator[Outcome]:
    """From this process, so many at a time; the next request is taken when one has come back."""
    with ThreadPoolExecutor(num_threads) as pool:
        flying: dict[Future[Answer | None], str] = {}
        while True:
            for request in itertools.islice(requests, num_threads - len(flying)):
                flying[pool.submit(endpoint.answer, request)] = request.key
            if not flying:
                return
            for future in wait(flying, return_when=FIRST_COMPLETED).done:
                error = future.exception()
                endpoint.stop.reason = endpoint.stop.reason or ("error" if error else "")
                yield flying.pop(future), error or future.result()


def _send_by_cluster(runtime: Runtime, requests: Iterator[Request]) -> Iterator[Outcome]:
    """From the workers of a Ray cluster, which share concurrency and rate limits; only this process stores answers."""
    workers = min(runtime.num_workers, runtime.writer_concurrency)
    share = runtime.model_copy(update={"workers": workers, "writer_concurrency": runtime.writer_concurrency // workers})
    size = share.writer_concurrency * ROUND
    wave = list(itertools.islice(requests, workers * size * ROUND))
    batches = [wave[start:start + size] for start in range(0, len(wave), size)]
    yield from itertools.chain.from_iterable(spread(functools.partial(_worker, share, workers), batches, share))


def _worker(runtime: Runtime, num_workers: int) -> Callable[[list[Request]], list[Outcome]]:
    """The key comes from the environment of the worker's machine: it is never sent over the network."""
    endpoint = Endpoint(runtime, Stop(), share=num_workers)
    return lambda batch: list(_send_by_threads(endpoint, runtime.writer_concurrency, iter(batch)))
