from __future__ import annotations

import io
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from onediff.config import Config
from onediff.data.quality.checks import (
    SUITES,
    SuiteResult,
    broken,
    check_suite,
    complaints,
    judged,
    suites_of,
    validate,
    write_report,
)
from onediff.data.record import Record, write_shards

ROOT = Path(__file__).parents[3]
ROW = {"source": "edits", "listed_as": "edits", "change_type": "blur", "num_images": 2, "decodes": True, "error": "",
       "num_missing_images": 0, "width_before": 96, "height_before": 96, "width_after": 96, "height_after": 96,
       "num_references": 3, "max_words": 5, "num_empty_references": 0, "has_bad_text": False, "language": "en"}


def table(num_pairs: int = 40, suite: str = "generated", **wrong: object) -> pd.DataFrame:
    """A good probe table; `wrong` changes values of the row number 5."""
    rows = [ROW | {"pair_id": f"p{k}", "split": ("train", "train", "val", "gate", "test")[k % 5], "group_id": f"g{k}",
                   "hash_before": f"b{k}", "hash_after": f"a{k}", "suite": suite} for k in range(num_pairs)]
    rows[5] |= wrong
    return pd.DataFrame(rows)


def verdict(rows: pd.DataFrame, *, tolerance: float = 0.0, partial: tuple[str, ...] = ()) -> SuiteResult:
    return check_suite(rows["suite"].iloc[0], judged(rows), tolerance=tolerance, partial=partial)


GONE = {"decodes": False, "width_before": 0, "height_before": 0, "hash_before": "", "num_missing_images": 1,
        "error": "before: a.png is missing"}


WRONG = {  # what is wrong with row 5 -> what the quarantine says
    "unreadable": (
        {"decodes": False, "width_before": 0, "height_before": 0, "hash_before": "", "error": "before image: corrupt"},
        "an image cannot be read"),
    "missing": (GONE, "an image is missing"),
    "images": ({"num_images": 3}, "neither two images, nor one, nor none"),
    "no id": ({"pair_id": ""}, "pair_id, source, group_id or change_type is empty"),
    "split": ({"split": "dev"}, "split is none of train, val, gate, test"),
    "small": ({"width_after": 31, "height_after": 31}, "an image is less than 32 px wide or high"),
    "no caption": ({"num_references": 0, "max_words": 0}, "no caption"),
    "empty": ({"num_empty_references": 1}, "an empty caption"),
    "long": ({"max_words": 10_000}, "a caption of more than "),
    "text": ({"has_bad_text": True}, "text that is not UTF-8"),
}


@pytest.mark.parametrize("suite", SUITES)
def test_a_good_table_has_nothing_bad_and_may_be_used(suite: str) -> None:
    good = verdict(table(suite=suite))
    assert good.bad.empty
    assert complaints([good]) == []


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("what", WRONG)
def test_each_wrong_pair_is_quarantined_for_its_reason_and_no_other(what: str, suite: str) -> None:
    wrong, reason = WRONG[what]
    bad = verdict(table(suite=suite, **wrong)).bad
    assert list(bad.index) == [5]
    assert bad["reasons"][5].startswith(reason)
    assert ";" not in bad["reasons"][5]


def test_people_may_write_longer_captions_than_programs() -> None:
    assert [len(verdict(table(suite=suite, max_words=300)).bad) for suite in ("generated", "raw")] == [1, 0]


def test_only_generated_pairs_must_be_of_one_shape() -> None:
    bad = [verdict(table(suite=suite, width_after=128)).bad for suite in SUITES]
    assert [list(rows["reasons"]) for rows in bad] == [["before and after differ in shape"], [], []]
    assert verdict(table(width_after=64, height_after=64)).bad.empty


@pytest.mark.parametrize("number", [0, 1])
def test_general_instruction_data_may_have_fewer_images_and_long_answers(number: int) -> None:
    width = {0: 0, 1: 96}[number]
    general = {"num_images": number, "width_before": width, "height_before": width, "width_after": 0,
               "height_after": 0, "hash_after": "", "max_words": 700}
    assert verdict(table(suite="raw", **general)).bad.empty
    assert len(verdict(table(suite="raw", **general | {"num_references": 0})).bad) == 1
    if number:
        assert len(verdict(table(suite="raw", **general | {"width_before": 31})).bad) == 1


def test_both_pairs_of_a_duplicate_id_are_quarantined_also_across_suites() -> None:
    bad = verdict(table(pair_id="p7")).bad
    assert list(bad["pair_id"]) == ["p7", "p7"]
    assert set(bad["reasons"]) == {"pair_id occurs more than once"}
    both = judged(pd.concat([table(), table(6, suite="raw").iloc[5:]], ignore_index=True))
    assert [len(check_suite(suite, both, tolerance=0).bad) for suite in ("generated", "raw")] == [1, 1]


def test_every_reason_is_listed() -> None:
    assert verdict(table(num_empty_references=2, has_bad_text=True, split="dev")).bad["reasons"][5].count(";") == 2


def test_the_number_of_splits_of_an_image_equals_a_slow_count() -> None:
    random = np.random.default_rng(5)
    rows = table(97).assign(**{name: [f"{k}" if k else "" for k in random.integers(0, 60, 97)]
                               for name in ("hash_before", "hash_after", "group_id")},
                            suite=random.choice(["raw", "generated"], 97))
    counted = judged(rows)
    for place, row in rows.iterrows():
        mates = rows[rows["suite"] == row["suite"]]
        counts = [mates[(mates[["hash_before", "hash_after"]] == row[side]).any(axis=1)]["split"].nunique()
                  for side in ("hash_before", "hash_after") if row[side]]
        assert counted.loc[place, "num_image_splits"] == max(counts, default=0)
        group = mates[mates["group_id"] == row["group_id"]]["split"].nunique() if row["group_id"] else 0
        assert counted.loc[place, "num_group_splits"] == group


def test_the_suite_follows_from_where_params_list_a_source(micro: Config) -> None:
    data = micro.data.model_copy(update={"generated": ["scenes"], "raw": ["own"], "retrieved": ["coco"],
                                         "diffused": ["flickr"]})
    rows = pd.DataFrame({"listed_as": ["scenes", "own", "coco", "flickr"]}, index=[3, 5, 7, 11])
    assert suites_of(rows, data).to_dict() == {3: "generated", 5: "raw", 7: "raw", 11: "generated"}


@pytest.mark.parametrize("suite", SUITES)
def test_great_expectations_finds_as_many_as_the_quarantine(suite: str) -> None:
    wrongs = [table(6, suite=suite, **wrong).iloc[5:] for wrong, _ in WRONG.values()]
    everything = pd.concat([table(suite=suite), *wrongs], ignore_index=True)
    everything.loc[1, ["hash_before", "group_id", "width_after"]] = ["b2", "g2", 128]
    checked = verdict(everything)
    result = validate(checked)
    assert not result.success
    for rule, outcome in zip(SUITES[suite], result.results, strict=True):
        assert outcome.expectation_config.kwargs["column"] == rule.column
        assert outcome.result["unexpected_count"] == broken(rule, checked.rows).sum() > 0, rule.reason


# --- going on or stopping ---


def test_an_image_in_two_splits_stops_generated_data_whatever_the_tolerance() -> None:
    leaking = {"hash_after": "b7"}  # row 7 is val, row 5 train
    lines = complaints([verdict(table(**leaking), tolerance=1.0)])
    assert lines == ["2 pairs: an image occurs in two splits (first: p5)"]
    assert complaints([verdict(table(suite="diffcap", **leaking), tolerance=1.0)]) == lines
    assert complaints([verdict(table(suite="raw", **leaking))]) == []  # data.leaks decides


def test_a_group_in_two_splits_stops_generated_data() -> None:
    lines = complaints([verdict(table(group_id="g7"), tolerance=1.0)])
    assert lines == ["2 pairs: its group_id occurs in two splits (first: p5)"]


def test_the_tolerance_decides_over_bad_pairs() -> None:
    wrong = table(num_empty_references=1)
    assert complaints([verdict(wrong, tolerance=1 / 40)]) == []
    assert complaints([verdict(wrong, tolerance=0.01)]) == [
        "1 of 40 generated pairs are bad (2.50%, tolerance 1.00%; first: p5: an empty caption)"]


def test_a_bad_pair_of_a_whole_test_set_is_never_passed_over() -> None:
    own = table(suite="raw").assign(listed_as="own")
    own.loc[[4, 9], list(GONE)] = list(GONE.values())
    checked = verdict(own, tolerance=1.0)
    assert complaints([checked], whole=("own",)) == [
        "own: 2 test pairs are bad (first: p4: an image is missing (before: a.png is missing)), but the test "
        "split of a published source must be complete: fix data/raw/own, or add own to data.partial"]
    assert complaints([checked]) == []
    train = own.assign(split=own["split"].replace({"test": "train", "train": "test"}))
    assert complaints([verdict(train, tolerance=1.0)], whole=("own",)) == []


def test_missing_images_of_a_partial_source_count_against_no_tolerance() -> None:
    wrong = table(suite="raw", **GONE)
    assert len(complaints([verdict(wrong)])) == 1
    excused = verdict(wrong, partial=("edits",))
    assert complaints([excused]) == []
    assert list(excused.bad["reasons"]) == ["an image is missing"]  # and is left out all the same
    worse = verdict(table(suite="raw", **GONE, num_empty_references=1), partial=("edits",))
    assert len(complaints([worse])) == 1


def test_a_split_without_pairs_and_an_empty_table_are_refused() -> None:
    assert complaints([verdict(table()[lambda rows: rows["split"] != "gate"])]) == [
        "no pair in split gate; each of train, val, gate, test needs at least one"]
    empty = judged(table().iloc[:0])
    assert len(complaints([check_suite("raw", empty, tolerance=0)])) == 4
    halves = [check_suite(suite, judged(pd.concat([
        table().query("split != 'gate'"), table(suite="raw").query("split == 'gate'")])), tolerance=1)
        for suite in ("raw", "generated")]
    assert complaints(halves) == []


# --- the report ---


def pair(number: int) -> Record:
    file = io.BytesIO()
    Image.new("RGB", (53, 37), (5 * number, 0, 0)).save(file, "PNG")
    return Record(f"p{number}", "edits", "train", f"g{number}", file.getvalue(), file.getvalue(),
                  ["<i>a caption</i>"], "What changed?", "blur", {})


def test_the_report_is_one_page_that_needs_no_network_and_shows_the_offenders(tmp_path: Path) -> None:
    records = [pair(k) for k in range(40)]
    records[5] = replace(records[5], pair_id="<b>", after=b"no image")
    write_shards(records[:3], tmp_path / "one", "train", shard_pairs=50)
    write_shards(records[3:], tmp_path / "two", "train", shard_pairs=50)
    checked = verdict(table(num_empty_references=1, pair_id="<b>"), tolerance=0.01)
    pages = []
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^1 of 40 generated pairs are bad .*; see .*/validation/index\.html$"):
            write_report([checked], tmp_path / "validation", shard_folders=[tmp_path / "one", tmp_path / "two"])
        pages.append((tmp_path / "validation/index.html").read_text(encoding="utf-8"))
    assert pages[0] == pages[1]
    assert [file.name for file in (tmp_path / "validation").iterdir()] == ["index.html"]
    assert not re.search(r"https?://|<script|<link|<b>&lt;b&gt;</b>.*<i>", pages[0])
    assert "1 of 40 generated pairs are bad (2.50%, tolerance 1.00%; first: &lt;b&gt;: an empty caption)" in pages[0]
    assert 'an empty caption</td><td class="number">1</td><td>&lt;b&gt;</td>' in pages[0]
    assert pages[0].count('<img src="data:image/jpeg;base64,') == 1  # the other cannot be read
    assert "image: not an image" in pages[0]
    assert "&lt;i&gt;a caption&lt;/i&gt;" in pages[0]
    assert "num_empty_references" in pages[0].partition("Results of Great Expectations")[2]


def test_a_report_on_other_shards_than_were_probed_is_refused(tmp_path: Path) -> None:
    write_shards([pair(k + 1) for k in range(40)], tmp_path / "one", "train", shard_pairs=50)
    checked = verdict(table(num_empty_references=1))
    with pytest.raises(ValueError, match=r"train-00000\.parquet: has pair p6 where data/probe\.parquet has p5"):
        write_report([checked], tmp_path, shard_folders=[tmp_path / "one"])


def test_importing_the_checks_does_not_import_great_expectations() -> None:
    program = "import sys, onediff.data.quality.checks; sys.exit('great_expectations' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0
