"""Tests that the readers count the pairs and references of published datasets as the authors of the datasets do."""

from __future__ import annotations

from pathlib import Path

import pytest
from published_sets import (
    REQUESTS,
    SPOT,
    captioned_rows,
    conversation_rows,
    edit_folder,
    picture,
    put,
    put_list,
    request_entries,
    scene_files,
    spot_entries,
)

from onediff.data.sources.read import as_text, summarize


def test_spot_the_diff_has_the_official_counts(tmp_path: Path) -> None:
    for split in SPOT:
        put(tmp_path / f"annotations/{split}.json", spot_entries(split))
    summary = summarize("spot_the_diff", tmp_path)
    for split, (records, pairs, references, empty) in SPOT.items():
        counts = summary["splits"][split]
        assert (counts["records"], counts["pairs"]) == (records, pairs)
        assert (counts["references"], counts["empty"]) == (references, empty)
        assert counts["missing_images"] == 2 * pairs
        assert not counts["complete"], "a split whose images are missing must not count as complete"
    assert summary["shared"] == {"test-val": 0, "train-val": 0, "train-test": 0}
    assert summary["missing"][:2] == ["0.png", "0_2.png"]
    assert len(summary["missing"]) == 20


def test_image_editing_request_has_the_official_counts_and_the_known_leaks(tmp_path: Path) -> None:
    for split, entries in request_entries().items():
        put(tmp_path / f"{split}.json", entries)
    summary = summarize("image_editing_request", tmp_path)
    for split, (records, pairs, _) in REQUESTS.items():
        counts = summary["splits"][{"valid": "val"}.get(split, split)]
        assert (counts["records"], counts["pairs"]) == (records, pairs)
    assert summary["shared"] == {"test-val": 55, "train-val": 2, "train-test": 1}


def test_clevr_change_has_the_official_counts_and_change_types(tmp_path: Path) -> None:
    for name, value in scene_files().items():
        put(tmp_path / name, value)
    splits = summarize("clevr_change", tmp_path)["splits"]
    assert [splits[split]["pairs"] for split in ("train", "val", "test")] == [67660, 3976, 7970]
    assert [splits[split]["records"] for split in ("train", "val", "test")] == [33830, 1988, 3985]
    assert splits["test"]["types"] == {"add": 797, "color": 797, "drop": 797, "move": 797, "none": 3985, "texture": 797}


@pytest.mark.slow
def test_instruct_pix2pix_and_llava_have_the_official_counts(tmp_path: Path) -> None:
    edit_folder(tmp_path / "edits", 62602, samples=5)
    assert summarize("instruct_pix2pix", tmp_path / "edits")["splits"]["train"]["pairs"] == 313010
    for source, rows, count in (("llava_558k", captioned_rows, 558128), ("llava_665k", conversation_rows, 665298)):
        (tmp_path / source).mkdir()
        put_list(tmp_path / source / "rows.json", rows(count))
        counts = summarize(source, tmp_path / source)["splits"]["train"]
        assert counts["records"] == counts["expected"]["records"] == count


def test_the_summary_of_an_incomplete_download_lists_the_missing_images(tmp_path: Path) -> None:
    put(tmp_path / "test.json", [{"img_id": 7, "sentences": ["a car left", " "]}, {"img_id": "8", "sentences": [""]}])
    for name in ("7.png", "7_2.png", "8.jpg"):
        picture(tmp_path / "images" / name, 1)
    summary = summarize("spot_the_diff", tmp_path)
    assert summary["missing"] == ["8_2.png"]
    test = summary["splits"]["test"]
    assert (test["records"], test["references"], test["empty"], test["unreferenced"]) == (2, 1, 2, 1)
    assert (test["missing_images"], test["missing_pairs"], test["complete"]) == (1, 1, False)
    text = as_text(summary)
    assert "missing: 8_2.png" in text
    assert "published: records 1,404, pairs 1,270, references 2,107" in text
    assert "train: no records" in text


def test_the_error_for_a_misspelt_source_contains_the_most_similar_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'spot_the_dif' is not a published set .did you mean 'spot_the_diff'"):
        summarize("spot_the_dif", tmp_path)
    with pytest.raises(ValueError, match=r"'mine' is not a published set .* does not contain pairs\.csv"):
        summarize("mine", tmp_path)


def test_the_error_for_a_missing_dataset_contains_the_command_that_downloads_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist: run 'onediff data fetch spot_the_diff', then put"):
        summarize("spot_the_diff", tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"must contain train\.json or val\.json or test\.json"):
        summarize("spot_the_diff", tmp_path)
