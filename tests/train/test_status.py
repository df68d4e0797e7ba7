from __future__ import annotations

from pathlib import Path

import pytest

from onediff.train.status import read_status, recorded_errors, write_status


def test_a_signal_before_the_first_step_is_recorded_as_preempted(tmp_path: Path) -> None:
    write_status(tmp_path, "running", 0)
    with pytest.raises(KeyboardInterrupt), recorded_errors(tmp_path):
        raise KeyboardInterrupt("SIGHUP")
    assert read_status(tmp_path) == {"state": "preempted", "step": 0, "reason": "SIGHUP"}


@pytest.mark.parametrize("blocked", [False, True])
def test_an_error_is_recorded_and_raised_even_if_status_json_cannot_be_written(blocked: bool, tmp_path: Path) -> None:
    write_status(tmp_path, "running", 4)
    if blocked:
        (tmp_path / "status.json.part").mkdir()  # This folder makes writing status.json fail, as a full disk would.
    with pytest.raises(MemoryError, match="no room"), recorded_errors(tmp_path):
        raise MemoryError("no room")
    expected = ("running", "") if blocked else ("failed", "MemoryError: no room")
    status = read_status(tmp_path)
    assert (status["state"], status["reason"]) == expected


def test_an_error_does_not_replace_the_state_diverged(tmp_path: Path) -> None:
    write_status(tmp_path, "diverged", 7, "loss nan at step 7")
    with pytest.raises(ValueError, match="the loss became nan"), recorded_errors(tmp_path):
        raise ValueError("the loss became nan")
    assert read_status(tmp_path)["state"] == "diverged"
