"""The queue of pairs that wait for their captions. Pairs of different clients are taken out together, as one batch."""

import asyncio
from collections import deque
from dataclasses import dataclass, field

from onediff.config import Serve
from onediff.model.captioner import Pair
from onediff.serve.http.schemas import Grid


@dataclass(frozen=True)
class Captioned:
    """What a model version answers about one pair. A value that the model cannot give is None.

    `heat_map` has one grid for the before image and one for the after image.
    """

    caption: str
    confidence: float
    changed: bool | None
    heat_map: tuple[Grid, Grid] | None
    version: str
    digest: str


@dataclass(frozen=True)
class Job:
    """A pair that waits for its caption, with the image files of the client. The result is set in `outcome`.

    `place` is the position of the pair in the body of the request.
    """

    files: tuple[bytes, bytes]
    images: Pair
    instruction: str
    heat_map: bool
    place: str = ""
    outcome: asyncio.Future[Captioned] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    @property
    def megapixels(self) -> float:
        return sum(image.width * image.height for image in self.images) / 1e6


class Queue:
    """Jobs in the order of their arrival. A job whose `outcome` was cancelled costs no caption."""

    def __init__(self, limits: Serve) -> None:
        self._jobs: deque[Job] = deque()
        self._limits, self._arrived = limits, asyncio.Event()
        self.announced = 0  # requests whose images are being read, and whose jobs will arrive soon

    def add(self, jobs: list[Job]) -> None:
        self._jobs.extend(jobs)
        self._arrived.set()

    async def take(self) -> list[Job]:
        """Wait for jobs, and return those of the next batch, at most as many as the limits of a batch allow.

        While other requests are being read, the function waits a few milliseconds for their jobs.
        """
        while True:
            await self._arrived.wait()
            deadline = asyncio.get_running_loop().time() + self._limits.batch_wait_ms / 1e3
            while (self.announced and len(self._jobs) < self._limits.batch_pairs
                   and asyncio.get_running_loop().time() < deadline):
                await asyncio.sleep(0.001)
            if batch := self._next():
                return batch

    def _next(self) -> list[Job]:
        batch: list[Job] = []
        megapixels = 0.0
        while self._jobs and len(batch) < self._limits.batch_pairs:
            if not self._jobs[0].outcome.cancelled():
                megapixels += self._jobs[0].megapixels
                if batch and megapixels > self._limits.batch_megapixels:
                    break
                batch.append(self._jobs[0])
            self._jobs.popleft()
        if not self._jobs:
            self._arrived.clear()
        return batch
