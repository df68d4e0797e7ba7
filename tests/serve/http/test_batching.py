from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from PIL import Image

from onediff.config import Serve
from onediff.serve.http.batching import Job, Queue


def job(side: int = 100) -> Job:
    image = Image.new("RGB", (side, side))
    return Job((b"", b""), (image, image), "what?", False)


def run(check: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(check(), 10))


def test_batches_keep_the_order_and_the_limit_of_pairs() -> None:
    async def check() -> None:
        queue, jobs = Queue(Serve(batch_pairs=3)), [job() for _ in range(7)]
        queue.add(jobs[:2])
        queue.add(jobs[2:])
        batches = [await queue.take() for _ in range(3)]
        assert [len(batch) for batch in batches] == [3, 3, 1]
        assert [one for batch in batches for one in batch] == jobs

    run(check)


def test_a_batch_has_at_most_the_allowed_pixels_but_at_least_one_pair() -> None:
    async def check() -> None:
        queue = Queue(Serve(batch_megapixels=0.05))
        queue.add([job(100), job(100), job(100), job(1000), job(100)])
        assert [len(await queue.take()) for _ in range(4)] == [2, 1, 1, 1]

    run(check)


def test_a_cancelled_job_is_in_no_batch() -> None:
    async def check() -> None:
        queue, jobs = Queue(Serve()), [job() for _ in range(3)]
        queue.add(jobs)
        jobs[0].outcome.cancel()
        jobs[2].outcome.cancel()
        assert await queue.take() == [jobs[1]]
        waiting = asyncio.create_task(queue.take())
        await asyncio.sleep(0.02)
        assert not waiting.done()
        last = job()
        queue.add([last])
        assert await waiting == [last]

    run(check)


def test_a_batch_waits_for_requests_that_are_being_read() -> None:
    async def check() -> None:
        queue, jobs = Queue(Serve(batch_wait_ms=5000)), [job(), job()]
        queue.announced = 1
        waiting = asyncio.create_task(queue.take())
        queue.add(jobs[:1])
        await asyncio.sleep(0.02)
        assert not waiting.done()
        queue.add(jobs[1:])
        queue.announced = 0
        assert await waiting == jobs

    run(check)


def test_a_batch_waits_only_for_the_set_time() -> None:
    async def check() -> None:
        queue, only = Queue(Serve(batch_wait_ms=20)), job()
        queue.announced = 1
        queue.add([only])
        assert await queue.take() == [only]

    run(check)
