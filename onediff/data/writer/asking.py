"""Sends every request that has no stored answer yet, within the budget, and stores each answer as soon as it arrives.
"""

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

# (key of a request, result): the result is the answer, the error that was raised, or None if nothing was sent.
Outcome = tuple[str, Answer | BaseException | None]
Send = Callable[[Iterator[Request]], Iterator[Outcome]]
ROUND = 4  # In one round, each Ray worker gets this many batches, each with this many requests per thread.


@dataclass
class Tally:
    """What one run used: the number of new answers by status, the tokens, and the cost in US dollars.

    `usd` includes the attempts without a reply, each at the maximum cost of the request.
    """

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
    """A budget in US dollars for requests; spent and reserved money together never exceed `cap`.

    `spent` is the cost of the answers received so far, `reserved` the maximum cost of each request that waits for an
    answer.
    """

    cap: float
    spent: float
    # maps the key of each request to its maximum cost in US dollars
    reserved: dict[str, float] = field(default_factory=dict)

    def reserve(self, key: str, usd: float) -> bool:
        """Reserve the maximum cost `usd` of a request; return False, and reserve nothing, if it exceeds the budget."""
        if self.spent + sum(self.reserved.values()) + usd > self.cap:
            return False
        self.reserved[key] = usd
        return True


def ask_for_stage(source: str, config: Config, runtime: Runtime, stage: Stage) -> dict[str, Answer]:
    """Send the requests of one stage that have no answer yet, print the cost, and return all stored answers by key.

    Raises the errors that `ask` raises.
    """
    path = answers_path(source, stage)
    print(ask((job for job in jobs(source, config, stage) if isinstance(job, Request)), path, runtime))
    return read_answers(path)


def ask(requests: Iterable[Request], path: Path, runtime: Runtime) -> Tally:
    """Send the requests that have no answer in the file `path`, and append the new answers to it.

    After SIGINT, SIGTERM or SIGHUP no further request is sent, the answers to requests in flight are stored, and
    InterruptedError is raised. Raises ValueError if the budget is exhausted, a price is not set or the endpoint rejects
    the requests, ConnectionError if the endpoint cannot be reached, and OSError if the disk is full.
    """
    stop = Stop()
    with open_answers(path) as file, postponed(stop):
        unanswered = _unanswered(requests, set(read_answers(path)))
        first = next(unanswered, None)
        if first is None:
            return Tally()
        max_tokens(first).usd(runtime)  # If a price is not set, this raises ValueError before any request is sent.
        send = (functools.partial(_send_by_cluster, runtime) if runtime.engine == "ray" else
                functools.partial(_send_by_threads, Endpoint(runtime, stop), runtime.writer_concurrency))
        run = _Run(itertools.chain([first], unanswered), file, runtime, stop)
        with tqdm(desc=f"asking {shown_url(runtime)}", unit="answer") as progress:
            run.ask_all(send, progress.update)
        if stop.reason:
            raise InterruptedError(f"{stop.reason}: stopped after {run.tally}; the answers are stored in {path}; run "
                                   "the command again to continue")
    return run.tally


def _unanswered(requests: Iterable[Request], keys: set[str]) -> Iterator[Request]:
    for request in requests:
        if request.key not in keys:
            keys.add(request.key)
            yield request


class _Run:
    """One run of the writer, which sends requests in rounds and stores the answers.

    A round sends requests while the budget allows it, and ends when all of them are answered. Answers usually cost less
    than the reserved maximum, so the next round can send more requests.
    """

    def __init__(self, requests: Iterator[Request], file: FileIO, runtime: Runtime, stop: Stop) -> None:
        self.tally = Tally()
        self._requests, self._file, self._runtime, self._stop = requests, file, runtime, stop
        self._budget = Budget(runtime.writer_max_usd, spent_usd())
        self._is_finished = False

    def ask_all(self, send: Send, progress: Callable[[], object]) -> None:
        """Send all requests in rounds; if a request fails, store the answers to all sent requests and raise the error.
        """
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
                # The next round sends this request if the answers of this round cost less than the reserved money.
                self._requests = itertools.chain([request], self._requests)
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
        """Return the exception that explains why no request can be sent: the disk is full, or the budget is exhausted.
        """
        if not has_room(self._file):
            return OSError(f"{self._file.name}: less than {MIN_FREE_BYTES >> 20} MiB of disk space are free, so no "
                           f"request is sent; free disk space and run the command again. This run: {self.tally}")
        usd = max_tokens(next(self._requests)).usd(self._runtime)
        return ValueError(f"runtime.yaml: writer_max_usd {self._budget.cap:g}: the answers in data/answers cost "
                          f"{self._budget.spent:.4f} USD and the next request may cost {usd:.4f} USD; set "
                          f"writer_max_usd higher. This run: {self.tally}")


def _send_by_threads(endpoint: Endpoint, num_threads: int, requests: Iterator[Request]) -> Iterator[Outcome]:
    """Send requests from threads of this process, and yield (key, result) as soon as each result is known.

    At most `num_threads` requests wait for an answer at a time. Each later request is taken from `requests` only when
    an earlier request is answered, so that the budget can be checked with the real cost.
    """
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
    """Send one round of requests from the workers of a Ray cluster, and yield (key, result) for each request.

    The configured concurrency and rate limits are divided between the workers. Only this process stores answers.
    """
    workers = min(runtime.num_workers, runtime.writer_concurrency)
    share = runtime.model_copy(update={"workers": workers, "writer_concurrency": runtime.writer_concurrency // workers})
    size = share.writer_concurrency * ROUND
    wave = list(itertools.islice(requests, workers * size * ROUND))
    batches = [wave[start:start + size] for start in range(0, len(wave), size)]
    yield from itertools.chain.from_iterable(spread(functools.partial(_worker, share, workers), batches, share))


def _worker(runtime: Runtime, num_workers: int) -> Callable[[list[Request]], list[Outcome]]:
    """Return the function with which a cluster worker sends a batch of requests.

    The worker reads the API key from the environment of its own machine, so the key never travels over the network.
    """
    endpoint = Endpoint(runtime, Stop(), share=num_workers)
    return lambda batch: list(_send_by_threads(endpoint, runtime.writer_concurrency, iter(batch)))
