from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from onediff.data.checks import RULES, broken, find_bad, judged, require, validate, write_report

ROOT = Path(__file__).parents[2]


def table(num_pairs: int = 40, **wrong: object) -> pd.DataFrame:
    """A good probe table; `wrong` changes values of the row number 5."""
    rows = []
    for k in range(num_pairs):
        split = ("train", "train", "val", "gate", "test")[k % 5]
        rows.append(
            {
                "pair_id": f"p{k}",
                "source": "edits",
                "split": split,
                "group_id": f"g{k}",
                "change_type": "blur",
                "decodes": True,
                "error": "",
                "width_before": 96,
                "height_before": 96,
                "width_after": 96,
                "height_after": 96,
                "mode": "RGB",
                "hash_before": f"b{k}",
                "hash_after": f"a{k}",
                "phash_before": k,
                "phash_after": k,
                "distance": 1.0,
                "num_references": 3,
                "min_words": 2,
                "max_words": 5,
                "num_empty_references": 0,
                "has_bad_text": False,
            }
        )
    rows[5] |= wrong
    return pd.DataFrame(rows)


WRONG = {  # what is wrong with row 5 -> what the quarantine says
    "unreadable": (
        {"decodes": False, "width_before": 0, "height_before": 0, "hash_before": "", "error": "before image: corrupt"},
        "an image cannot be read",
    ),
    "no id": ({"pair_id": ""}, "pair_id, source, group_id or change_type is empty"),
    "split": ({"split": "dev"}, "split is none of train, val, gate, test"),
    "small": ({"width_after": 31, "height_after": 31}, "an image is less than 32 px wide or high"),
    "shape": ({"width_after": 128}, "before and after differ in shape"),
    "no caption": ({"num_references": 0, "min_words": 0, "max_words": 0}, "no caption"),
    "empty": ({"num_empty_references": 1}, "an empty caption"),
    "long": ({"max_words": 101}, "a caption of more than 100 words"),
    "text": ({"has_bad_text": True}, "text that is not UTF-8"),
}


def test_a_good_table_has_nothing_bad_and_may_be_used() -> None:
    good = judged(table())
    assert find_bad(good).empty
    require(good, find_bad(good), tolerance=0.0, report=Path("r"))


@pytest.mark.parametrize("what", WRONG)
def test_each_wrong_pair_is_quarantined_for_its_reason_and_no_other(what: str) -> None:
    wrong, reason = WRONG[what]
    bad = find_bad(judged(table(**wrong)))
    assert len(bad) == 1
    assert bad["reasons"][0].startswith(reason)
    assert ";" not in bad["reasons"][0]


def test_sizes_may_differ_where_the_shape_is_the_same() -> None:
    assert find_bad(judged(table(width_after=64, height_after=64))).empty


def test_both_pairs_of_a_duplicate_id_are_quarantined() -> None:
    bad = find_bad(judged(table(pair_id="p7")))
    assert list(bad["pair_id"]) == ["p7", "p7"]
    assert set(bad["reasons"]) == {"pair_id occurs more than once"}


def test_every_reason_is_told() -> None:
    bad = find_bad(judged(table(num_empty_references=2, has_bad_text=True, split="dev")))
    assert bad["reasons"][0].count(";") == 2


def test_great_expectations_finds_as_many_as_the_quarantine() -> None:
    everything = pd.concat([table(), *[table(6, **wrong).iloc[5:] for wrong, _ in WRONG.values()]], ignore_index=True)
    everything.loc[1, ["hash_before", "group_id"]] = ["b2", "g2"]
    checked = judged(everything)
    result = validate(checked)
    assert not result.success
    for rule, outcome in zip(RULES, result.results, strict=True):
        assert outcome.expectation_config.kwargs["column"] == rule.column
        assert outcome.result["unexpected_count"] == broken(rule, checked).sum() > 0, rule.reason


def test_an_image_in_two_splits_stops_the_run_whatever_the_tolerance() -> None:
    checked = judged(table(hash_after="b7"))  # row 7 is val, row 5 train
    with pytest.raises(ValueError, match=r"2 pairs: an image occurs in two splits \(first: p5\); see r"):
        require(checked, find_bad(checked), tolerance=1.0, report=Path("r"))


def test_a_group_in_two_splits_stops_the_run() -> None:
    checked = judged(table(group_id="g7"))
    with pytest.raises(ValueError, match="its group_id occurs in two splits"):
        require(checked, find_bad(checked), tolerance=1.0, report=Path("r"))


def test_the_tolerance_decides_over_bad_pairs() -> None:
    checked = judged(table(num_empty_references=1))
    require(checked, find_bad(checked), tolerance=1 / 40, report=Path("r"))
    with pytest.raises(
        ValueError, match=r"1 of 40 pairs are bad \(2\.50%, tolerance 1\.00%; first: p5: an empty caption\); see r"
    ):
        require(checked, find_bad(checked), tolerance=0.01, report=Path("r"))


def test_a_split_without_pairs_and_an_empty_table_are_refused() -> None:
    for some in (table()[lambda rows: rows["split"] != "gate"], table().iloc[:0]):
        checked = judged(some)
        with pytest.raises(ValueError, match=r"no pair in split (gate|train)"):
            require(checked, find_bad(checked), tolerance=1.0, report=Path("r"))


def test_the_report_is_one_page_that_needs_no_network(tmp_path: Path) -> None:
    checked = judged(table(num_empty_references=1, pair_id="<b>"))
    path = write_report(checked, find_bad(checked), tmp_path / "validation", tolerance=0.05)
    page = path.read_text(encoding="utf-8")
    assert [file.name for file in path.parent.iterdir()] == ["index.html"]
    assert not re.search(r"https?://|<script|<link|<img", page)
    assert "40 pairs, 1 bad (2.50%; tolerance 5.00%)" in page
    assert "<tr><td>an empty caption</td><td>1</td><td>&lt;b&gt;</td></tr>" in page
    assert "num_empty_references" in page
    assert "values must be unique" in page  # Great Expectations' own words


def test_importing_the_checks_does_not_import_great_expectations() -> None:
    program = "import sys, onediff.data.checks; sys.exit('great_expectations' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0
