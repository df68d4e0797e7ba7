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
       "num_references": 3, "max_words": 5, "num_empty_references": 0, "has_bad_text": False,
       "control_words": "", "language": "en"}


def table(num_pairs: int = 40, suite: str = "generated", **wrong: object) -> pd.DataFrame:
    """Return a table of probe rows without faults, except that `wrong` changes values of row 5."""
    rows = [ROW | {"pair_id": f"p{k}", "split": ("train", "train", "val", "gate", "test")[k % 5], "group_id": f"g{k}",
                   "hash_before": f"b{k}", "hash_after": f"a{k}", "suite": suite} for k in range(num_pairs)]
    rows[5] |= wrong
    return pd.DataFrame(rows)


def check(rows: pd.DataFrame, *, tolerance: float = 0.0, partial: tuple[str, ...] = ()) -> SuiteResult:
    return check_suite(rows["suite"].iloc[0], judged(rows), tolerance=tolerance, partial=partial)


WITHOUT_IMAGE = {"decodes": False, "width_before": 0, "height_before": 0, "hash_before": "", "num_missing_images": 1,
                 "error": "before: a.png is missing"}
# Each fault has the values that it changes in row 5, and the start of the reason in the quarantine.
FAULTS: dict[str, tuple[dict[str, object], str]] = {
    "unreadable": (
        {"decodes": False, "width_before": 0, "height_before": 0, "hash_before": "", "error": "before image: corrupt"},
        "an image cannot be read"),
    "missing": (WITHOUT_IMAGE, "an image is missing"),
    "images": ({"num_images": 3}, "the number of images is not 0, 1 or 2"),
    "no id": ({"pair_id": ""}, "pair_id, source, group_id or change_type is empty"),
    "split": ({"split": "dev"}, "the split is not one of train, val, gate, test"),
    "small": ({"width_after": 31, "height_after": 31}, "an image is less than 32 px wide or high"),
    "no caption": ({"num_references": 0, "max_words": 0}, "no caption"),
    "empty": ({"num_empty_references": 1}, "an empty caption"),
    "long": ({"max_words": 10_000}, "a caption of more than "),
    "text": ({"has_bad_text": True}, "text that is not UTF-8"),
}


@pytest.mark.parametrize("suite", SUITES)
def test_a_table_without_faults_is_accepted_and_has_no_bad_pairs(suite: str) -> None:
    result = check(table(suite=suite))
    assert result.bad.empty
    assert complaints([result]) == []


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_pair_with_one_fault_is_quarantined_with_exactly_one_reason(fault: str, suite: str) -> None:
    wrong, reason = FAULTS[fault]
    bad = check(table(suite=suite, **wrong)).bad
    assert list(bad.index) == [5]
    assert bad["reasons"][5].startswith(reason)
    assert ";" not in bad["reasons"][5]


def test_captions_of_raw_pairs_may_be_longer_than_captions_of_generated_pairs() -> None:
    assert [len(check(table(suite=suite, max_words=300)).bad) for suite in ("generated", "raw")] == [1, 0]


def test_only_the_two_images_of_generated_pairs_must_have_one_aspect_ratio() -> None:
    bad = [check(table(suite=suite, width_after=128)).bad for suite in SUITES]
    assert [list(rows["reasons"]) for rows in bad] == [["the two images differ in aspect ratio"], [], []]
    assert check(table(width_after=64, height_after=64)).bad.empty


@pytest.mark.parametrize("number", [0, 1])
def test_general_instruction_data_may_have_fewer_images_and_long_answers(number: int) -> None:
    width = {0: 0, 1: 96}[number]
    general = {"num_images": number, "width_before": width, "height_before": width, "width_after": 0,
               "height_after": 0, "hash_after": "", "max_words": 700}
    assert check(table(suite="raw", **general)).bad.empty
    assert len(check(table(suite="raw", **general | {"num_references": 0})).bad) == 1
    if number:
        assert len(check(table(suite="raw", **general | {"width_before": 31})).bad) == 1


def test_both_pairs_with_a_duplicate_id_are_quarantined_even_if_their_suites_differ() -> None:
    bad = check(table(pair_id="p7")).bad
    assert list(bad["pair_id"]) == ["p7", "p7"]
    assert set(bad["reasons"]) == {"pair_id occurs more than once"}
    both = judged(pd.concat([table(), table(6, suite="raw").iloc[5:]], ignore_index=True))
    assert [len(check_suite(suite, both, tolerance=0).bad) for suite in ("generated", "raw")] == [1, 1]


def test_a_pair_with_three_faults_is_quarantined_with_three_reasons() -> None:
    assert check(table(num_empty_references=2, has_bad_text=True, split="dev")).bad["reasons"][5].count(";") == 2


def test_the_number_of_splits_of_an_image_equals_a_slow_count() -> None:
    random = np.random.default_rng(5)
    rows = table(97).assign(**{name: [f"{k}" if k else "" for k in random.integers(0, 60, 97)]
                               for name in ("hash_before", "hash_after", "group_id")},
                            suite=random.choice(["raw", "generated"], 97))
    result = judged(rows)
    for label, row in rows.iterrows():
        suite = rows[rows["suite"] == row["suite"]]
        counts = [suite[(suite[["hash_before", "hash_after"]] == row[side]).any(axis=1)]["split"].nunique()
                  for side in ("hash_before", "hash_after") if row[side]]
        assert result.loc[label, "num_image_splits"] == max(counts, default=0)
        num_splits = suite[suite["group_id"] == row["group_id"]]["split"].nunique() if row["group_id"] else 0
        assert result.loc[label, "num_group_splits"] == num_splits


def test_the_suite_of_a_source_depends_on_the_key_of_params_yaml_that_lists_the_source(micro: Config) -> None:
    data = micro.data.model_copy(update={"generated": ["scenes"], "raw": ["own"], "retrieved": ["coco"],
                                         "diffused": ["flickr"]})
    rows = pd.DataFrame({"listed_as": ["scenes", "own", "coco", "flickr"]}, index=[3, 5, 7, 11])
    assert suites_of(rows, data).to_dict() == {3: "generated", 5: "raw", 7: "raw", 11: "generated"}


@pytest.mark.parametrize("suite", SUITES)
def test_great_expectations_counts_as_many_faults_as_the_quarantine(suite: str) -> None:
    wrong_rows = [table(6, suite=suite, **wrong).iloc[5:] for wrong, _ in FAULTS.values()]
    rows = pd.concat([table(suite=suite), *wrong_rows], ignore_index=True)
    rows.loc[1, ["hash_before", "group_id", "width_after"]] = ["b2", "g2", 128]
    checked = check(rows)
    result = validate(checked)
    assert not result.success
    for rule, outcome in zip(SUITES[suite], result.results, strict=True):
        assert outcome.expectation_config.kwargs["column"] == rule.column
        assert outcome.result["unexpected_count"] == broken(rule, checked.rows).sum() > 0, rule.reason


def test_generated_data_with_an_image_in_two_splits_is_refused_even_at_tolerance_1() -> None:
    shared_image = {"hash_after": "b7"}  # Row 5 is in split train, and row 7 with this image is in split val.
    lines = complaints([check(table(**shared_image), tolerance=1.0)])
    assert lines == ["2 pairs: an image occurs in two splits (first: p5)"]
    assert complaints([check(table(suite="diffcap", **shared_image), tolerance=1.0)]) == lines
    # In raw data, the setting data.leaks decides what happens to such pairs.
    assert complaints([check(table(suite="raw", **shared_image))]) == []


def test_generated_data_with_a_group_in_two_splits_is_refused() -> None:
    lines = complaints([check(table(group_id="g7"), tolerance=1.0)])
    assert lines == ["2 pairs: the group_id occurs in two splits (first: p5)"]


def test_data_is_refused_if_the_share_of_bad_pairs_is_above_the_tolerance() -> None:
    wrong = table(num_empty_references=1)
    assert complaints([check(wrong, tolerance=1 / 40)]) == []
    assert complaints([check(wrong, tolerance=0.01)]) == [
        "1 of 40 generated pairs are bad (2.50%, tolerance 1.00%; first: p5: an empty caption)"]


def test_a_published_source_with_a_bad_test_pair_is_refused_even_at_tolerance_1() -> None:
    own = table(suite="raw").assign(listed_as="own")
    own.loc[[4, 9], list(WITHOUT_IMAGE)] = list(WITHOUT_IMAGE.values())
    checked = check(own, tolerance=1.0)
    assert complaints([checked], whole=("own",)) == [
        "own: 2 test pairs are bad (first: p4: an image is missing (before: a.png is missing)), but the test "
        "split of a published source must be complete: fix data/raw/own, or add own to data.partial"]
    assert complaints([checked]) == []
    train = own.assign(split=own["split"].replace({"test": "train", "train": "test"}))
    assert complaints([check(train, tolerance=1.0)], whole=("own",)) == []


def test_missing_images_of_a_partial_source_do_not_count_against_the_tolerance() -> None:
    wrong = table(suite="raw", **WITHOUT_IMAGE)
    assert len(complaints([check(wrong)])) == 1
    partial = check(wrong, partial=("edits",))
    assert complaints([partial]) == []
    assert list(partial.bad["reasons"]) == ["an image is missing"]
    second_fault = check(table(suite="raw", **WITHOUT_IMAGE, num_empty_references=1), partial=("edits",))
    assert len(complaints([second_fault])) == 1


def test_a_split_without_pairs_and_an_empty_table_are_refused() -> None:
    assert complaints([check(table()[lambda rows: rows["split"] != "gate"])]) == [
        "no pair in split gate; each of train, val, gate, test needs at least one"]
    empty = judged(table().iloc[:0])
    assert len(complaints([check_suite("raw", empty, tolerance=0)])) == 4
    halves = [check_suite(suite, judged(pd.concat([
        table().query("split != 'gate'"), table(suite="raw").query("split == 'gate'")])), tolerance=1)
        for suite in ("raw", "generated")]
    assert complaints(halves) == []



def pair(number: int) -> Record:
    file = io.BytesIO()
    Image.new("RGB", (53, 37), (5 * number, 0, 0)).save(file, "PNG")
    return Record(f"p{number}", "edits", "train", f"g{number}", file.getvalue(), file.getvalue(),
                  ["<i>a caption</i>"], "What changed?", "blur", {})


def test_the_report_is_one_page_that_shows_the_bad_pairs_without_network_access(tmp_path: Path) -> None:
    records = [pair(k) for k in range(40)]
    records[5] = replace(records[5], pair_id="<b>", after=b"no image")
    write_shards(records[:3], tmp_path / "one", "train", shard_pairs=50)
    write_shards(records[3:], tmp_path / "two", "train", shard_pairs=50)
    checked = check(table(num_empty_references=1, pair_id="<b>"), tolerance=0.01)
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
    assert pages[0].count('<img src="data:image/jpeg;base64,') == 1  # The after image of this pair cannot be read.
    assert "image: not an image" in pages[0]
    assert "&lt;i&gt;a caption&lt;/i&gt;" in pages[0]
    assert "num_empty_references" in pages[0].partition("Results of Great Expectations")[2]


def test_the_report_names_pairs_with_words_that_look_like_control_tokens(tmp_path: Path) -> None:
    checked = check(table(pair_id="shop-7", control_words="<image> </s>"))
    write_report([checked], tmp_path, shard_folders=[])
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "1 pair has texts with words that look like control tokens" in page
    assert "shop-7 (&lt;image&gt; &lt;/s&gt;)." in page
    assert checked.bad.empty, "The words are text, so the pair is not bad."


def test_shards_that_differ_from_the_probed_shards_are_refused(tmp_path: Path) -> None:
    write_shards([pair(k + 1) for k in range(40)], tmp_path / "one", "train", shard_pairs=50)
    checked = check(table(num_empty_references=1))
    with pytest.raises(ValueError, match=r"train-00000\.parquet: contains pair p6 where .* lists pair p5; run"):
        write_report([checked], tmp_path, shard_folders=[tmp_path / "one"])


def test_importing_the_checks_does_not_import_great_expectations() -> None:
    program = "import sys, onediff.data.quality.checks; sys.exit('great_expectations' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0
