"""Counts what all requests in progress hold together, and refuses a request for which the server has no room."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from onediff.config import Serve
from onediff.serve.http.errors import ApiError

_LARGEST_BODIES = 10  # number of bodies of the largest size that the memory must hold at once


@dataclass
class Share:
    """What one request holds: the bytes of its body, and its pairs of images."""

    num_bytes: int = 0
    num_pairs: int = 0


class Intake:
    """The requests in progress, the bytes of their bodies, and their pairs."""

    def __init__(self, limits: Serve) -> None:
        self._limits = limits
        self._most_bytes = int(_LARGEST_BODIES * limits.body_mb * 1e6)
        self.num_requests = self.num_bytes = self.num_pairs = 0

    @property
    def is_full(self) -> bool:
        """Return True if the server has no room for another pair."""
        return max(self.num_pairs, self.num_requests) >= self._limits.waiting_pairs

    @contextmanager
    def request(self) -> Iterator[Share]:
        """Count a request during the `with` block. Raises ApiError (429) if too many pairs wait already."""
        if self.is_full:
            raise self._busy()
        self.num_requests += 1
        share = Share()
        try:
            yield share
        finally:
            self.num_requests -= 1
            self.num_bytes -= share.num_bytes
            self.num_pairs -= share.num_pairs

    def add_bytes(self, share: Share, number: int) -> None:
        """Count bytes of the body of a request. Raises ApiError (429) if the memory has no room for them."""
        if self.num_bytes + number > self._most_bytes:
            raise self._busy()
        share.num_bytes += number
        self.num_bytes += number

    def add_pairs(self, share: Share, number: int) -> None:
        """Count the pairs of a request. Raises ApiError (429) if too many pairs wait already."""
        if self.num_pairs + number > self._limits.waiting_pairs:
            raise self._busy()
        share.num_pairs += number
        self.num_pairs += number

    def _busy(self) -> ApiError:
        return ApiError(429, f"the server is busy: at most {self._limits.waiting_pairs} pairs may wait; send the "
                        "request again in a second", code="server_busy",
                        headers={"retry-after": "1", "connection": "close"})
