from __future__ import annotations

import json
from pathlib import Path

import pytest
from published_sets import picture, put

from onediff.data.record import SPLITS, Record
from onediff.data.sources.published import open_files
from onediff.data.sources.read import records, summarize
from onediff.data.sources.readers.folder import assign_splits, divided

EXAMPLES = Path(__file__).resolve().parents[4] / "examples"


def read(folder: Path) -> list[Record]:
    files = open_files(folder, folder.parent / "scratch")
    return [record for split in SPLITS for record in records("mine", files, split)]


def test_the_pairs_of_both_example_folders_are_read() -> None:
    pairs = {record.pair_id.rpartition("-")[2]: record for record in read(EXAMPLES / "folder")}
    assert sorted(pairs) == ["000001", "000002", "000003", "000004", "000005"]
    assert pairs["000001"].references == ["the red disc is green now", "the disc on the left turned from red to green"]
    assert pairs["000004"].references == ["a blue disc, small, appeared at the bottom left"]
    assert pairs["000005"].before == pairs["000005"].after == (EXAMPLES / "folder/images/5_after.png").read_bytes()
    train, test = read(EXAMPLES / "folder_jsonl")
    assert (train.pair_id, train.split, train.group_id) == ("mine-train-disc", "train", "mine-table 1")
    assert train.instruction == "What is different in the second picture?"
    assert (test.split, len(test.references), test.change_type) == ("test", 2, "add")
    assert summarize("mine", EXAMPLES / "folder")["missing"] == []


def test_references_are_read_from_all_columns_for_references(tmp_path: Path) -> None:
    put(tmp_path / "pairs.csv", "before,after,references,reference,reference_2\na.png,b.png,one| two |,three,\n")
    assert read(tmp_path)[0].references == ["one", "two", "three"]
    put(tmp_path / "pairs.csv", "before,after,reference_2,reference\na.png,b.png,two,one\n")
    assert read(tmp_path)[0].references == ["two", "one"]
    (tmp_path / "pairs.csv").unlink()
    put(tmp_path / "pairs.jsonl", '{"before": "a.png", "after": "b.png", "references": "a|b is one"}\n')
    assert read(tmp_path)[0].references == ["a|b is one"]


def test_rows_with_equal_images_and_instruction_are_one_pair(tmp_path: Path) -> None:
    put(tmp_path / "pairs.csv", "before,after,references,instruction,group,split,change_type\n"
        "a.png,b.png,one,,,test,\n./a.png,b.png,two|three,What changed between the two images?,g,,add\n"
        "a.png,b.png,four,Why?,,train,\nb.png,a.png,five,,,train,\n")
    [first, *others] = sorted(read(tmp_path), key=lambda record: record.pair_id.rpartition("-")[2])
    assert (first.pair_id, first.references, first.split) == ("mine-test-000001", ["one", "two", "three"], "test")
    assert (first.group_id, first.change_type) == ("mine-g", "add")
    assert [(record.pair_id, record.references) for record in others] == [
        ("mine-train-000003", ["four"]), ("mine-train-000004", ["five"])]
    assert summarize("mine", tmp_path)["splits"]["test"]["records"] == 2


def test_a_row_without_a_reference_gets_that_of_another_row_of_its_pair(tmp_path: Path) -> None:
    put(tmp_path / "pairs.csv", "before,after,references,split\na.png,b.png,,test\na.png,b.png,one,test\n")
    assert read(tmp_path)[0].references == ["one"]


def test_numbers_are_read_as_ids_groups_and_splits_and_other_values_are_refused(tmp_path: Path) -> None:
    row = {"before": "a.png", "after": "b.png", "references": ["x"], "split": "Train", "pair_id": 0, "group": 0}
    put(tmp_path / "pairs.jsonl", json.dumps(row | {"change_type": None, "reference": None}))
    [record] = read(tmp_path)
    assert (record.pair_id, record.group_id) == ("mine-train-0", "mine-0")
    for change, message in (({"pair_id": 1.5}, "pair_id: text expected, got 1.5"), ({"group": False}, "got false"),
                            ({"references": 3}, "references: a list expected, got 3"),
                            ({"references": [3]}, "references: text expected, got 3"),
                            ({"change_type": 3}, "change_type: text expected, got 3")):
        put(tmp_path / "pairs.jsonl", json.dumps(row | change))
        with pytest.raises(ValueError, match=rf"pairs\.jsonl line 1, .*{message}"):
            read(tmp_path)


def test_pairs_without_a_split_get_the_split_of_their_group() -> None:
    splits = [divided(f"group {k}") for k in range(4001)]
    shares = [splits.count(split) / 4001 for split in SPLITS]
    assert shares == pytest.approx([0.80, 0.05, 0.05, 0.10], abs=0.02)
    assert divided("group 7") == divided("group 7")
    groups = {f"group {k}": True for k in range(4001)}
    assert assign_splits(groups, taken=()) == {group: divided(group) for group in groups}


def test_a_few_pairs_without_a_split_give_every_split_a_pair() -> None:
    for start in range(0, 2000, 20):
        for number in (2, 3, 5, 10, 20):
            groups = {f"group {start + k}": True for k in range(number)}
            splits = list(assign_splits(groups, taken=()).values())
            assert {"train", "test"} <= {*splits}
            assert {*splits} == {*SPLITS} or number < 8 or 2 * splits.count("train") < number
            moved = sum(split != divided(group) for group, split in assign_splits(groups, taken=()).items())
            assert moved <= 3


def test_a_split_that_the_table_names_or_that_needs_references_gets_no_other_pair() -> None:
    groups = dict.fromkeys([group for group in map(str, range(50)) if divided(group) == "train"][:9], True)
    assert {*assign_splits(groups, taken={"test", "gate"}).values()} == {"train", "val"}
    assert {*assign_splits(dict.fromkeys(groups, False), taken=()).values()} == {"train"}
    assert assign_splits({"0": True}, taken=()) == {"0": "train"}


@pytest.mark.parametrize(("table", "message"), [
    ("before,after\n/etc/passwd,b.png\n", "line 2: before must be a path below the folder"),
    ("before,after\na.png,../b.png\n", "line 2: after must be a path below the folder"),
    ("before,after\na.png,\n", "after must be a path below the folder, .* got ''"),
    ("before,reference\na.png,b\n", "line 1: 'after' is missing"),
    ("before,after,captoin\na,b,c\n", "line 1: unknown column 'captoin'; allowed are before, after, references"),
    ("before;after;captoin\na;b;c\n", "line 1: unknown column 'captoin'"),
    ("before,after\nC:\\\\a.png,b.png\n", "line 2: before must be a path below the folder"),
    ("before,after\nfile:///a.png,b.png\n", "line 2: before must be a path below the folder"),
    ("before,after\nhttps://x.org/a.png,b.png\n",
     "line 2: before must be an image file below the folder, got the address 'https://x.org/a.png'; download"),
    ("before,after,split,reference\na,b,tset,c\n", "split must be one of train, val, gate, test or empty, got 'tset'"),
    ("before,after,split\na,b,test\n", "line 2: a pair of split test must have a reference"),
    ("before,after,split,reference\na,b,gate, \n", "line 2: a pair of split gate must have a reference"),
    ("before,after,reference\n", "the table contains no pair"),
    ("before,after,reference,reference\na,b,c,d\n", "line 1: the header contains column 'reference' twice"),
    ("before,after,pair_id,reference\na,b,1,x\nc,d,1,x\n", "line 3: pair_id '1' is already used in .*line 2"),
    ("before,after,pair_id,reference\na,b,1,x\na,b,2,y\n",
     "line 3: rows with equal images are one pair, so pair_id must be '1', as in .*line 2, got '2'"),
    ("before,after,split,reference\na,b,test,x\na,b,train,y\n", "line 3: .* split must be 'test', as in .*line 2"),
])
def test_the_error_for_an_invalid_table_contains_the_line(table: str, message: str, tmp_path: Path) -> None:
    put(tmp_path / "pairs.csv", table)
    with pytest.raises(ValueError, match=message):
        read(tmp_path)


def test_a_folder_with_two_tables_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "pairs.csv", "before,after\n")
    put(tmp_path / "pairs.jsonl", "")
    with pytest.raises(ValueError, match="the folder must contain one table"):
        read(tmp_path)


def test_an_image_with_a_similar_name_is_not_used_instead_of_a_missing_image(tmp_path: Path) -> None:
    put(tmp_path / "pairs.csv", "before,after,reference\nimages/frame_1.png,b.png,x\n")
    for name in ("images/frame_001.png", "images/frame_1.jpg", "old/images/frame_1.png", "deep/b.png"):
        picture(tmp_path / name, 1)
    [record] = read(tmp_path)
    assert record.provenance["missing"] == ["images/frame_1.png"]
    assert (record.before, record.after) == (b"", (tmp_path / "deep/b.png").read_bytes())
    exact = picture(tmp_path / "images/frame_1.png", 2)
    assert read(tmp_path)[0].before == exact.read_bytes()


def test_a_pair_with_a_missing_image_is_kept_and_lists_the_image(tmp_path: Path) -> None:
    put(tmp_path / "pairs.csv", "before,after,reference,split\nin/a.png,in/b.png,x,train\n")
    picture(tmp_path / "in/a.png", 1)
    assert read(tmp_path)[0].provenance["missing"] == ["in/b.png"]
    assert summarize("mine", tmp_path)["splits"]["train"]["missing_images"] == 1
