from __future__ import annotations

import pytest

from onediff.config import Serve
from onediff.serve.http.errors import ApiError
from onediff.serve.http.limits import Intake


def test_everything_that_a_request_holds_is_free_after_its_end() -> None:
    intake = Intake(Serve(pairs=5, waiting_pairs=5))
    with pytest.raises(ZeroDivisionError), intake.request() as share:
        intake.add_bytes(share, 700)
        intake.add_pairs(share, 3)
        assert (intake.num_requests, intake.num_bytes, intake.num_pairs) == (1, 700, 3)
        raise ZeroDivisionError
    assert (intake.num_requests, intake.num_bytes, intake.num_pairs) == (0, 0, 0)


def test_pairs_beyond_the_limit_are_refused_and_not_counted() -> None:
    intake = Intake(Serve(pairs=5, waiting_pairs=5))
    with intake.request() as first, intake.request() as second:
        intake.add_pairs(first, 3)
        with pytest.raises(ApiError, match="at most 5 pairs may wait") as refusal:
            intake.add_pairs(second, 3)
        assert (refusal.value.status, dict(refusal.value.headers or {})["retry-after"]) == (429, "1")
        intake.add_pairs(second, 2)
        assert intake.is_full
        with pytest.raises(ApiError), intake.request():
            pass
    assert not intake.is_full


def test_bodies_beyond_the_memory_are_refused() -> None:
    intake = Intake(Serve(body_mb=1.0))
    with intake.request() as share:
        intake.add_bytes(share, 10_000_000)
        with pytest.raises(ApiError) as refusal:
            intake.add_bytes(share, 1)
    assert (refusal.value.status, intake.num_bytes) == (429, 0)
