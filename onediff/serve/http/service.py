"""Service: loads model versions, and captions the pairs of different clients together.

The event loop owns the queue and all counters. Three kinds of threads do the work: one captions, batch after batch; a
few decode images, large images apart from small ones, so that nobody waits for another client's photograph; and one
loads a new version while the old one serves. The application gives the service two functions: `current` names the
version that should serve, and `load` loads a version.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi import Request

from onediff.config import Serve
from onediff.inputs.prompt import DEFAULT_INSTRUCTION
from onediff.serve.http.batching import Captioned, Job, Queue
from onediff.serve.http.captioning import Version, caption
from onediff.serve.http.errors import ApiError, ClientGoneError
from onediff.serve.http.limits import Intake
from onediff.serve.http.metrics import Metrics
from onediff.serve.http.pictures import is_large, open_picture
from onediff.serve.http.schemas import CaptionAnswer, HeatMap, ServedModel
from onediff.serve.http.uploads import Body, Question
from onediff.serve.usage_log import Use

if TYPE_CHECKING:
    from onediff.model.captioner import Pair

RETRY_S = 60.0  # seconds after which a version that could not be loaded is tried again
_log = logging.getLogger("onediff.serve")


class Service:
    """Answers pairs with the version that `current` names. `give_up` is called if the first version cannot be loaded.

    `version` is None until the first version is loaded. `problem` says why a newer version does not serve, or is None.
    `failure` is the error of the first version, if it could not be loaded.
    """

    def __init__(self, limits: Serve, *, current: Callable[[], str], load: Callable[[str], Version],
                 give_up: Callable[[], None] = lambda: None) -> None:
        self.limits, self.metrics = limits, Metrics()
        self.version: Version | None = None
        self.problem: str | None = None
        self.failure: BaseException | None = None
        self._current, self._load, self.give_up = current, load, give_up
        self._failed, self._retry_at = "", 0.0
        self._queue, self._intake = Queue(limits), Intake(limits)
        self.metrics.waiting.set_function(lambda: self._intake.num_pairs)
        self._captioning = ThreadPoolExecutor(1, "captioning")
        self._small, self._large = ThreadPoolExecutor(2, "small-images"), ThreadPoolExecutor(1, "large-images")

    @property
    def is_ready(self) -> bool:
        """Return True if a version is loaded and the queue has room."""
        return self.version is not None and not self._intake.is_full

    @asynccontextmanager
    async def running(self, _: Any = None) -> AsyncIterator[None]:
        """Load the version and caption during the `with` block, which is the lifespan of the FastAPI application."""
        tasks = [asyncio.create_task(self._watch()), asyncio.create_task(self._caption_batches())]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
            for pool in (self._captioning, self._small, self._large):
                pool.shutdown(cancel_futures=True)

    async def answer(self, request: Request,
                     read: Callable[[Body], Awaitable[list[Question]]]) -> list[CaptionAnswer]:
        """Return one answer for each pair that `read` takes out of the body of the request.

        Raises ApiError for a request that is refused, and ClientGoneError if the client closed the connection; its
        pairs then cost no caption.
        """
        start = time.perf_counter()
        if self.version is None:
            raise ApiError(503, "the model is still loading; try again in a few seconds", code="loading",
                           headers={"retry-after": "5", "connection": "close"})
        with self._intake.request() as share:
            questions = await read(Body(request, self.limits, self._intake, share))
            self._intake.add_pairs(share, len(questions))
            try:
                async with asyncio.timeout(self.limits.timeout_s):
                    captioned = await self._captions(request, questions)
            except TimeoutError:
                raise ApiError(504, f"no caption within {self.limits.timeout_s:g} s, because the server is busy; try "
                               "again later", code="timeout") from None
        milliseconds = round(1e3 * (time.perf_counter() - start), 1)
        return [_answer(question, one, milliseconds) for question, one in zip(questions, captioned, strict=True)]

    async def in_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run a function that takes some milliseconds, such as parsing a body, outside of the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._small, function, *arguments)

    async def _captions(self, request: Request, questions: list[Question]) -> list[Captioned]:
        self._queue.announced += 1
        try:
            pairs = [await self._pair(question) for question in questions]
        finally:
            self._queue.announced -= 1
        jobs = [Job((question.before, question.after), pair, question.instruction or DEFAULT_INSTRUCTION,
                    question.heat_map, question.place) for question, pair in zip(questions, pairs, strict=True)]
        self._queue.add(jobs)
        # Without return_exceptions, asyncio would log an error for each client that goes away.
        outcomes = asyncio.gather(*[job.outcome for job in jobs], return_exceptions=True)
        gone = asyncio.create_task(_until_gone(request))
        try:
            await asyncio.wait((outcomes, gone), return_when=asyncio.FIRST_COMPLETED)
            if not outcomes.done():
                raise ClientGoneError
            return [job.outcome.result() for job in jobs]
        finally:
            gone.cancel()
            for job in jobs:
                job.outcome.cancel()

    async def _pair(self, question: Question) -> Pair:
        """Return the decoded images of a question. Images with many pixels are decoded one at a time."""
        images = []
        for side in ("before", "after"):
            content = getattr(question, side)
            decode = partial(open_picture, content, self.limits, question.place + side)
            pool = self._large if await self.in_thread(is_large, content) else self._small
            images.append(await asyncio.get_running_loop().run_in_executor(pool, decode))
        return images[0], images[1]

    async def _caption_batches(self) -> None:
        """Caption batch after batch. The version may change between two batches."""
        while True:
            batch = await self._queue.take()
            assert self.version is not None, "pairs are accepted only while a version is loaded"
            self.metrics.batches.observe(len(batch))
            await self._caption_batch(self.version, batch)

    async def _caption_batch(self, version: Version, batch: list[Job]) -> None:
        """Set the outcome of each job. If the batch fails, each of its pairs is captioned alone."""
        done = asyncio.get_running_loop().run_in_executor(self._captioning, caption, version, batch, self.limits)
        await asyncio.wait([done])
        error = done.exception()
        if error is None:
            for job, outcome in zip(batch, done.result(), strict=True):
                self._settle(job, outcome)
            await self._log_use(version, batch, done.result())
        elif len(batch) > 1:
            for job in batch:
                await self._caption_batch(version, [job])
        else:
            _log.error("version %s cannot caption a pair", version.name, exc_info=error)
            self._settle(batch[0], ApiError(500, "the model cannot caption this pair; the log of the server explains "
                                            "it", code="internal_error"))

    def _settle(self, job: Job, outcome: Captioned | ApiError) -> None:
        if isinstance(outcome, Captioned):
            self.metrics.captions.labels("unknown" if outcome.changed is None else str(outcome.changed).lower()).inc()
        if job.outcome.done():  # The client has gone, or its time is over.
            return
        if isinstance(outcome, ApiError):
            job.outcome.set_exception(outcome)
        else:
            job.outcome.set_result(outcome)

    async def _log_use(self, version: Version, batch: list[Job], outcomes: list[Captioned | ApiError]) -> None:
        """Write the captions to the usage log. The next batch waits, so that a slow disk cannot fill the memory."""
        uses = [Use(job.files, job.images, job.instruction, outcome.caption, outcome.confidence)
                for job, outcome in zip(batch, outcomes, strict=True) if isinstance(outcome, Captioned)]
        if version.usage_log and uses:
            done = asyncio.get_running_loop().run_in_executor(self._captioning, version.usage_log.add, uses)
            await asyncio.wait([done])
            if error := done.exception():
                _log.error("captions were not written to the usage log", exc_info=error)

    async def _watch(self) -> None:
        """Load the first version, then look regularly whether another version should serve."""
        while True:
            await self._update()
            await asyncio.sleep(self.limits.poll_s)

    async def _update(self) -> None:
        """Let the version that `current` names serve. If it cannot be loaded, the old version continues."""
        named = _in_daemon_thread(self._current)
        await asyncio.wait([named])
        if error := named.exception():
            self._report("the server cannot find out which version should serve", error)
            return
        name = named.result()
        if self.version and name == self.version.name:
            if self.problem:
                _log.info("the problem is over: version %s should serve, and serves", name)
            self.problem, self._failed = None, ""
            return
        if name == self._failed and time.monotonic() < self._retry_at:
            return
        loaded = _in_daemon_thread(self._load_and_try, name)
        await asyncio.wait([loaded])
        if error := loaded.exception():
            self._failed, self._retry_at = name, time.monotonic() + RETRY_S
            self.metrics.loads.labels("failed").inc()
            self._report(f"version {name} cannot be loaded", error)
            return
        self.version, self.problem, self._failed = loaded.result(), None, ""
        self.metrics.loads.labels("loaded").inc()
        self.metrics.version.info({"version": name, "digest": self.version.digest})
        _log.info("ready: version %s, digest %s", name, self.version.digest[:12])

    def _load_and_try(self, name: str) -> Version:
        """Load a version and caption a blank pair with it, so that a version that cannot caption never serves."""
        from PIL import Image

        version = self._load(name)
        version.captioner.caption([(Image.new("RGB", (64, 64)), Image.new("RGB", (64, 64)))], max_new_tokens=2)
        return version

    def _report(self, problem: str, error: BaseException) -> None:
        """Log a problem with a new version. The public text has no details, because they may contain paths."""
        if self.version is None:
            self.failure = error
            self.give_up()
            return
        public = f"{problem}, so version {self.version.name} continues to serve; the log of the server explains it"
        if public != self.problem:
            _log.error("%s, so version %s continues to serve: %s", problem, self.version.name, error)
        self.problem = public


def _answer(question: Question, one: Captioned, milliseconds: float) -> CaptionAnswer:
    answer = CaptionAnswer(caption=one.caption, changed=one.changed, confidence=round(one.confidence, 5), regions=None,
                           familiar=None, model=ServedModel(version=one.version, digest=one.digest),
                           milliseconds=milliseconds)
    if question.heat_map:
        answer.heat_map = one.heat_map and HeatMap(before=one.heat_map[0], after=one.heat_map[1])
    return answer


async def _until_gone(request: Request) -> None:
    """Return when the client closes the connection. The body of the request must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _in_daemon_thread(function: Callable[..., Any], *arguments: Any) -> asyncio.Future[Any]:
    """Run a function in a thread that does not keep the process alive, so that Ctrl-C also ends a long loading."""
    result: Future[Any] = Future()

    def run() -> None:
        try:
            result.set_result(function(*arguments))
        except BaseException as error:  # noqa: BLE001 - The event loop handles every error of the function.
            result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return asyncio.wrap_future(result)
