"""The stage stopped by SIGTERM and killed by SIGKILL: nothing that was paid for is lost or paid again."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.writer import measure


@pytest.mark.slow
@pytest.mark.parametrize("honours_keys", [True, False])
def test_two_kills_lose_no_answer_and_no_answer_is_paid_twice(tmp_path: Path, honours_keys: bool) -> None:
    measured = measure(tmp_path, num_pairs=1000, seconds=0.3, concurrency=16, honours_keys=honours_keys)
    assert measured["exit_codes"] == [1, -9, 0]
    assert measured["answers_kept"] == measured["pairs_written"] == measured["billed_keys"] == 1000
    assert measured["kept_twice"] == measured["paid_but_lost"] == 0
    assert measured["failed_429_500"] > 20
    # An endpoint that does not honour Idempotency-Key bills again what was in flight at the SIGKILL, and no more.
    assert measured["billed_twice"] <= (0 if honours_keys else 16)
