from __future__ import annotations

import pytest

from onediff.eval.analysis.language import language


def test_length_variety_and_what_was_learned_by_heart() -> None:
    got = language(["The red cube", "the red  cube", "a ball left", ""], ["the red cube", "it rained"])
    assert got == {"words": 9 / 4, "vocabulary": 6, "different": 3 / 4, "distinct_1": 6 / 9, "distinct_2": 4 / 6,
                   "empty": 1 / 4, "copied": 2 / 4}


def test_one_sentence_for_all_has_no_variety() -> None:
    got = language(["nothing has changed"] * 50, [])
    assert (got["different"], got["distinct_1"]) == (1 / 50, pytest.approx(3 / 150)) and "copied" not in got
