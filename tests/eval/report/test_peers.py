from __future__ import annotations

from onediff.eval.metrics.catalog import METRICS
from onediff.eval.protocols import PROTOCOLS
from onediff.eval.report.peers import _published_rows, doubts, published


def test_every_published_score_has_a_protocol_and_a_source() -> None:
    assert set(_published_rows()) < set(PROTOCOLS)
    for rows in _published_rows().values():
        for row in rows:
            assert row.keys() <= {"system", "source", "unreproduced", "saw_test_items", "floor", *METRICS}, row
            assert row["system"] and row["source"] and 10 < row["CIDEr"] < 200


def test_published_systems_are_sorted_by_score_and_shown_with_doubts() -> None:
    rows = published("image_editing_request")
    assert [row["system"] for row in rows[:2]] == ["M3Diff", "OneDiff (the paper)"]
    assert [doubts(row) for row in rows[:3]] == ["may have trained on test items", "not reproduced by others", ""]
    assert published("scenes") == published("spot_the_diff/multi") == []
