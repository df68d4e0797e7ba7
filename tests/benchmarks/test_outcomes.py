from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from benchmarks import outcomes as o
from onediff.config import Config
from onediff.data.record import Record
from onediff.data.synthesis.edits.records import edit_records


@pytest.fixture(scope="module")
def rows(scene_pairs: list[Record], micro: Config) -> list[dict[str, Any]]:
    """Pairs of scenes, of which some are unchanged, and eight edits with their swapped pairs."""
    edits = [record for index in range(8) for record in edit_records(micro, "test", index)]
    return [vars(record) for record in (*scene_pairs, *edits)]


def captions(rows: list[dict[str, Any]], *, right: bool) -> dict[str, dict[str, str]]:
    """Return captions of all trials: the references, or the claim that a red cube was added."""
    texts = {row["pair_id"]: row["references"][0] if right else "a red cube was added" for row in rows}
    return dict.fromkeys((o.TEST, *o.WORN.values()), texts)


def test_references_are_right_and_one_claim_is_always_a_false_alarm(rows: list[dict[str, Any]]) -> None:
    right, wrong = (o.outcomes(captions(rows, right=is_right), rows) for is_right in (True, False))
    alarms = {"false alarms", *o.WORN}
    assert alarms < right.keys() and {"type", "object", "operation", "unseen photographs"} < right.keys()
    for figure in right:
        assert o.mean_of([right[figure]]) == (0.0 if figure in alarms else 1.0), figure
    assert all(o.mean_of([wrong[figure]]) == 1.0 for figure in alarms)
    assert o.mean_of([wrong["operation"]]) < 0.5
    assert [group for group, _ in right["type"]] == [group for group, _ in wrong["type"]]
    photographs = [row for row in rows if "photo/" in str(row["group_id"])]
    assert len(right["unseen photographs"]) == len(photographs)


def test_an_unreadable_caption_is_neither_right_nor_a_false_alarm(rows: list[dict[str, Any]]) -> None:
    texts = {row["pair_id"]: "a dog barks" for row in rows}
    result = o.outcomes(dict.fromkeys((o.TEST, *o.WORN.values()), texts), rows)
    assert all(o.mean_of([values]) == 0.0 for values in result.values())


def test_the_bootstrap_over_one_seed_equals_a_loop_over_groups() -> None:
    rng = np.random.default_rng(3)
    pairs = [(f"g{number // 3}", float(rng.random() < 0.6)) for number in range(120)]
    low, high = o.interval(o.resampled({"a": [pairs]})["a"])
    groups: dict[str, list[float]] = {}
    for group, value in pairs:
        groups.setdefault(group, []).append(value)
    values = list(groups.values())
    means = [np.mean(np.concatenate([values[place] for place in rng.integers(len(values), size=len(values))]))
             for _ in range(4000)]
    expected = np.quantile(means, (0.025, 0.975))
    assert (low, high) == pytest.approx(expected, abs=0.02)


def test_seeds_that_differ_widen_the_interval_and_equal_systems_do_not_differ() -> None:
    good, bad = ([(f"g{number}", value) for number in range(50)] for value in (1.0, 0.0))
    drawn = o.resampled({"a": [good, good, bad], "b": [good, good, bad], "c": [good, good, good]})
    assert o.interval(drawn["a"]) == (0.0, 1.0)
    same = o.difference(0.0, drawn["a"], drawn["b"])
    assert (same.low, same.high, same.p) == (0.0, 0.0, 1.0)
    assert o.difference(1 / 3, drawn["c"], drawn["a"]).low == 0.0
    with pytest.raises(ValueError, match="b: all systems must have outcomes of the same pairs"):
        o.resampled({"a": [good], "b": [good[1:]]})


def test_a_pair_without_a_trial_caption_is_not_counted(scene_pairs: list[Record]) -> None:
    unchanged = [vars(replace(record, change_type="none")) for record in scene_pairs[:3]]
    texts = {str(row["pair_id"]): "nothing has changed" for row in unchanged[:2]}
    assert len(o.false_alarms(texts, unchanged)) == 2
