"""The stage stopped by SIGTERM and killed by SIGKILL: nothing that was paid for is lost or paid again."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.writer import measure


@pytest.mark.slow
@pytest.mark.parametrize("honours_keys", [True, False])
def test_two_kills_lose_nothing_and_pay_nothing_twice(tmp_path: Path, honours_keys: bool) -> None:
    found = measure(tmp_path, num_pairs=1000, seconds=0.3, concurrency=16, honours_keys=honours_keys)
    assert found["exit_codes"] == [1, -9, 0]
    assert found["answers_kept"] == found["pairs_written"] == found["billed_keys"] == 1000
    assert found["kept_twice"] == found["paid_but_lost"] == 0
    assert found["failed_429_500"] > 20
    # An endpoint that does not honour Idempotency-Key bills again what was in flight at the SIGKILL, and no more.
    assert found["billed_twice"] <= (0 if honours_keys else 16)
