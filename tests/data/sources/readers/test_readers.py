"""Tests of the reader of each published dataset, on a small valid dataset and on datasets with errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from published_sets import bird_row, bird_table, picture, put

from onediff.data.record import Record
from onediff.data.sources.published import open_files
from onediff.data.sources.read import records, summarize

CASES = Path(__file__).resolve().parents[5] / "shared/cases"
SPLITS = ("train", "val", "gate", "test")
needs_cases = pytest.mark.skipif(not CASES.is_dir(), reason=f"the folder {CASES} with real excerpts does not exist")


def read(source: str, folder: Path) -> dict[str, Record]:
    """Return every record of a source by pair id, and check that no pair id occurs twice."""
    files = open_files(folder, folder.parent / "scratch")
    all_records = [record for split in SPLITS for record in records(source, files, split)]
    by_id = {record.pair_id: record for record in all_records}
    assert len(by_id) == len(all_records)
    return by_id


def test_entries_of_spot_the_diff_with_one_id_are_merged(tmp_path: Path) -> None:
    put(tmp_path / "data/train.json", [{"img_id": "1001", "sentences": ["a  car\tleft", ""]},
                                       {"img_id": "9", "sentences": ["x"]},
                                       {"img_id": "1001", "sentences": ["a man came"]}])
    before, after = picture(tmp_path / "images/1001.jpeg", 1), picture(tmp_path / "images/01001_2.png", 2)
    pairs = read("spot_the_diff", tmp_path)
    record = pairs["spot_the_diff-train-1001"]
    assert record.references == ["a car left", "a man came"]
    assert (record.before, record.after) == (before.read_bytes(), after.read_bytes())
    assert record.provenance == {"official_id": "1001", "official_split": "train", "names": ["1001.png", "1001_2.png"],
                                 "empty_references": 1}
    without_images = pairs["spot_the_diff-train-9"]
    assert "empty_references" not in without_images.provenance
    assert (without_images.before, without_images.after) == (b"", b"")
    assert without_images.provenance["missing"] == ["9.png", "9_2.png"]


def test_an_empty_sentence_is_kept_only_if_it_is_the_only_reference_of_a_test_pair(tmp_path: Path) -> None:
    for split in ("train", "test"):
        put(tmp_path / f"{split}.json", [{"img_id": "5", "sentences": [""]}, {"img_id": "6", "sentences": ["", "x"]}])
    pairs = read("spot_the_diff", tmp_path)
    references = {name.removeprefix("spot_the_diff-"): record.references for name, record in pairs.items()}
    assert references == {"train-5": [], "train-6": ["x"], "test-5": [""], "test-6": ["x"]}


def test_the_published_val_split_is_divided_into_val_and_gate_by_pair_id(tmp_path: Path) -> None:
    put(tmp_path / "val.json", [{"img_id": str(k), "sentences": ["x"]} for k in range(997)])
    splits = {name: record.split for name, record in read("spot_the_diff", tmp_path).items()}
    assert set(splits.values()) == {"val", "gate"}
    assert 400 < list(splits.values()).count("gate") < 600
    put(tmp_path / "val.json", [{"img_id": str(k), "sentences": ["x"]} for k in range(100, 0, -1)])
    fewer = {name: record.split for name, record in read("spot_the_diff", tmp_path).items()}
    assert fewer == {name: splits[name] for name in fewer}


@pytest.mark.parametrize(("entry", "message"), [
    ({"sentences": ["x"]}, r"entry 1 \(line 1\): 'img_id' is missing, got only sentences"),
    ({"img_id": "1", "sentences": "x"}, "sentences: a list expected, got \"x\""),
    ({"img_id": "1", "sentences": [3]}, "text expected, got 3"),
    ({"img_id": None, "sentences": []}, "img_id: text expected, got null"),
])
def test_an_invalid_entry_of_spot_the_diff_is_refused(entry: object, message: str, tmp_path: Path) -> None:
    put(tmp_path / "test.json", [entry])
    with pytest.raises(ValueError, match=message):
        summarize("spot_the_diff", tmp_path)


@needs_cases
def test_real_spot_the_diff_entries_are_read(tmp_path: Path) -> None:
    text = (CASES / "annotations/spot_the_diff_val_first200.json").read_text()
    put(tmp_path / "val.json", text)
    val = summarize("spot_the_diff", tmp_path)["splits"]["val"]
    entries = json.loads(text)
    assert val["records"] == len(entries)
    assert val["pairs"] == len({entry["img_id"] for entry in entries})
    assert val["references"] + val["empty"] == sum(len(entry["sentences"]) for entry in entries)


def test_the_uid_of_an_edit_request_must_be_unique_and_requests_for_one_pair_get_one_split(tmp_path: Path) -> None:
    entries = [{"uid": name, "img0": "a.jpg", "img1": "b.gif", "sents": ["brighter"] * 3} for name in "xyz"]
    put(tmp_path / "valid.json", entries)
    picture(tmp_path / "images/a.jpg", 1)
    picture(tmp_path / "images/b.png", 2)
    pairs = read("image_editing_request", tmp_path)
    assert sorted(pairs) == [f"image_editing_request-val-{name}" for name in "xyz"]
    assert len({record.split for record in pairs.values()}) == 1, "a pair of images must not be in both val and gate"
    assert pairs["image_editing_request-val-x"].provenance["names"] == ["a.jpg", "b.gif"]
    put(tmp_path / "valid.json", [entries[0], entries[0]])
    with pytest.raises(ValueError, match=r"entry 2 .*: uid 'x' occurs a second time"):
        summarize("image_editing_request", tmp_path)


def test_the_before_image_is_not_used_as_the_missing_after_image(tmp_path: Path) -> None:
    put(tmp_path / "test.json", [{"uid": "1", "img0": "a.jpg", "img1": "a.png", "sents": ["x"]}])
    picture(tmp_path / "a.jpg", 1)
    record = read("image_editing_request", tmp_path)["image_editing_request-test-1"]
    assert record.before and not record.after
    assert record.provenance["missing"] == ["a.png"]


@needs_cases
def test_real_image_editing_requests_are_read(tmp_path: Path) -> None:
    put(tmp_path / "valid.json", (CASES / "annotations/image_editing_request_valid_first100.json").read_text())
    val = summarize("image_editing_request", tmp_path)["splits"]["val"]
    assert (val["records"], val["references"]) == (100, 300)


def test_descriptions_of_one_pair_of_birds_are_merged_and_images_are_found_by_photo_number(tmp_path: Path) -> None:
    rows = [bird_row(77, "test", 1, "Animal 1 is brown."), bird_row(5, "train", 1, "Both are grey."),
            bird_row(77, "test", 2, '"Animal 2 is ""big""."')]
    put(tmp_path / "birds-to-words-v1.0.tsv", bird_table(rows))
    picture(tmp_path / "images/771.png", 1)
    picture(tmp_path / "images/772/large.jpg", 2)
    train, test = read("birds_to_words", tmp_path).values()
    assert test.references == ["Animal 1 is brown.", 'Animal 2 is "big".']
    assert test.before and test.after and "missing" not in test.provenance
    assert test.provenance["names"][0] == "https://static.inaturalist.org/photos/771/large.jpg?1234"
    assert train.provenance["missing"] == train.provenance["names"]
    summary = summarize("birds_to_words", tmp_path)
    assert summary["splits"]["test"]["records"] == 2
    assert summary["splits"]["test"]["pairs"] == 1
    assert "the official counts are unknown, so only the format was checked" in summary["notes"]


def test_a_row_of_birds_to_words_with_an_unknown_split_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "birds-to-words-v1.0.tsv", bird_table([bird_row(1, "dev", 1, "x")]))
    with pytest.raises(ValueError, match=r"line 2: split must be one of train, val, test, got 'dev'"):
        summarize("birds_to_words", tmp_path)


def write_clevr(folder: Path, **files: object) -> None:
    """Write the annotation files of CLEVR-Change; `files` replaces the content of single files."""
    default = {"splits": {"train": [12], "val": [], "test": [7]},
               "change_captions": {"CLEVR_default_000012.png": ["it moved"], "CLEVR_default_000007.png": ["it shines"]},
               "no_change_captions": {"CLEVR_default_000012.png": ["the same"]},
               "type_mapping": {"move": ["000012.png"], "material": ["000007.png"]}}
    for name, value in (default | files).items():
        put(folder / f"{name}.json", value)


def test_a_scene_of_clevr_change_gives_a_changed_pair_and_an_unchanged_pair(tmp_path: Path) -> None:
    write_clevr(tmp_path)
    default = picture(tmp_path / "images/CLEVR_default_000012.png", 1)
    changed = picture(tmp_path / "sc_images/CLEVR_semantic_000012.png", 2)
    unchanged = picture(tmp_path / "nsc_images/CLEVR_nonsemantic_12.png", 3)
    pairs = read("clevr_change", tmp_path)
    changed_pair, unchanged_pair = (pairs[f"clevr_change-train-000012-{kind}"] for kind in ("semantic", "nonsemantic"))
    assert (changed_pair.before, changed_pair.after) == (default.read_bytes(), changed.read_bytes())
    assert (unchanged_pair.before, unchanged_pair.after) == (default.read_bytes(), unchanged.read_bytes())
    assert (changed_pair.change_type, changed_pair.references) == ("move", ["it moved"])
    assert (unchanged_pair.change_type, unchanged_pair.references) == ("none", ["the same"])
    assert changed_pair.group_id == unchanged_pair.group_id == "clevr_change-000012"
    assert pairs["clevr_change-test-000007-semantic"].change_type == "texture"
    assert pairs["clevr_change-test-000007-nonsemantic"].references == []


def test_invalid_and_missing_files_of_clevr_change_are_refused(tmp_path: Path) -> None:
    write_clevr(tmp_path, splits={"train": ["12"], "val": [], "test": []})
    with pytest.raises(ValueError, match=r"splits\.json, train: a number expected, got \"12\""):
        summarize("clevr_change", tmp_path)
    write_clevr(tmp_path, splits={"train": []})
    with pytest.raises(ValueError, match="'val' is missing, got only train"):
        summarize("clevr_change", tmp_path)
    write_clevr(tmp_path, change_captions={"cube.png": []})
    with pytest.raises(ValueError, match=r"change_captions\.json: image names must be like CLEVR_default_000000\.png"):
        summarize("clevr_change", tmp_path)
    (tmp_path / "type_mapping.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"must contain type_mapping\.json"):
        summarize("clevr_change", tmp_path)


@needs_cases
def test_real_splits_and_change_types_of_clevr_change_are_read(tmp_path: Path) -> None:
    splits = json.loads((CASES / "annotations/clevr_change_splits_first60.json").read_text())
    types = json.loads((CASES / "annotations/clevr_change_type_mapping_first40.json").read_text())
    write_clevr(tmp_path, splits=splits, change_captions={}, no_change_captions={}, type_mapping=types)
    counts = summarize("clevr_change", tmp_path)["splits"]
    assert {split: counts[split]["pairs"] for split in splits} == {split: 2 * len(splits[split]) for split in splits}
    assert sum(counts[split]["types"].get("color", 0) for split in splits) == sum(
        number < 40 for split in splits for number in splits[split])


@needs_cases
def test_a_real_prompt_folder_of_instruct_pix2pix_with_four_edits_gives_four_pairs() -> None:
    source = CASES / "instruct_pix2pix_folder"
    pairs = read("instruct_pix2pix", source)
    assert len(pairs) == 4
    record = pairs["instruct_pix2pix-train-0000014_10483310"]
    assert record.after == (source / "0000014/10483310_1.jpg").read_bytes()
    assert record.provenance["edit"] == "make it a lion"
    assert record.provenance["captions"][1] == "animals jungle lion branch hd wallpaper"
    assert record.provenance["similarity"]["sim_image"] == pytest.approx(0.8205305)
    assert (record.provenance["seed"], record.references, record.split) == (10483310, [], "train")
    assert {record.group_id for record in pairs.values()} == {"instruct_pix2pix-0000014"}


def test_invalid_and_duplicate_prompts_of_instruct_pix2pix_are_refused(tmp_path: Path) -> None:
    put(tmp_path / "one/0000014/prompt.json", {"input": "a", "edit": "b", "output": "c"})
    with pytest.raises(FileNotFoundError, match=r"metadata\.jsonl does not exist: unpack the published archive"):
        summarize("instruct_pix2pix", tmp_path)
    put(tmp_path / "one/0000014/metadata.jsonl", '{"seed": 1}\n{"seed": ')
    with pytest.raises(ValueError, match=r"metadata\.jsonl line 2: not valid JSON"):
        summarize("instruct_pix2pix", tmp_path)
    put(tmp_path / "two/0000014/prompt.json", {"input": "a", "edit": "b", "output": "c"})
    with pytest.raises(ValueError, match=r"one/0000014 and .*two/0000014 contain the same prompt"):
        summarize("instruct_pix2pix", tmp_path)


def turn(speaker: str, value: str) -> dict[str, str]:
    """Return a turn of a conversation in the format of LLaVA's datasets."""
    return {"from": speaker, "value": value}


def test_llava_558k_gives_records_of_one_image_and_a_caption(tmp_path: Path) -> None:
    put(tmp_path / "blip_laion_cc_sbu_558k.json", [
        {"id": "004539375", "image": "00453/004539375.jpg",
         "conversations": [turn("human", "Summarise the photo.\n<image>"), turn("gpt", "a  red car")]}])
    put(tmp_path / "blip_laion_cc_sbu_558k_meta.json", "[]")
    image = picture(tmp_path / "images/00453/004539375.jpg", 1)
    record = read("llava_558k", tmp_path)["llava_558k-train-004539375"]
    assert (record.num_images, record.before, record.after) == (1, image.read_bytes(), b"")
    assert (record.references, record.provenance["captions"]) == (["a red car"], ["a red car"])
    assert (record.instruction, record.change_type) == ("Summarise the photo.", "general")


def test_llava_665k_gives_conversations_with_one_image_or_without_an_image(tmp_path: Path) -> None:
    put(tmp_path / "llava_v1_5_mix665k.json", [
        {"id": "1", "image": "gqa/images/7.jpg", "conversations": [
            turn("human", "<image>\nWhat is it?"), turn("gpt", "A cat."), turn("human", "And?"),
            turn("gpt", "Big.\nYes")]},
        {"id": "1", "model": "", "conversations": [turn("gpt", "hello"), turn("human", "Hi"), turn("human", "you"),
                                                   turn("gpt", "Hi!"), turn("human", "unanswered")]}])
    picture(tmp_path / "gqa/images/7.jpg", 1)
    conversations = read("llava_665k", tmp_path)
    with_image, without_image = conversations["llava_665k-train-1"], conversations["llava_665k-train-1-2"]
    assert with_image.provenance["conversation"] == [["What is it?", "A cat."], ["And?", "Big.\nYes"]]
    assert (with_image.num_images, with_image.instruction, with_image.references) == (1, "What is it?", ["A cat."])
    assert (without_image.num_images, without_image.instruction, without_image.references) == (0, "Hi you", ["Hi!"])
    assert summarize("llava_665k", tmp_path)["splits"]["train"]["missing_images"] == 0
    put(tmp_path / "llava_v1_5_mix665k.json", [{"id": "1", "conversations": [turn("system", "x")]}])
    with pytest.raises(ValueError, match="a turn must be from human or gpt, got 'system'"):
        summarize("llava_665k", tmp_path)


def test_a_json_file_of_conversations_about_two_images_is_a_source(tmp_path: Path) -> None:
    """The entries have the form of M4-Instruct and of other data for models that read several images."""
    def entry(images: object, question: str, *others: str) -> dict[str, object]:
        texts = zip(["human", "gpt"] * 2, [question, "a tree", *others], strict=False)
        return {"id": 7, "image": images, "conversations": [{"from": name, "value": text} for name, text in texts]}

    before, after = picture(tmp_path / "images/a.png", 1), picture(tmp_path / "images/b.png", 2)
    table = tmp_path / "differences.json"
    put(table, [entry(["a.png", "b.png"], "<image>\n<image>\nWhat is new?", "Where?", "left"),
                entry("a.png", "<image>\nWhat is it?")])
    records = read("my_pairs", tmp_path)
    pair, single = records["my_pairs-train-7"], records["my_pairs-train-7-2"]
    assert (pair.images, pair.change_type) == ((before.read_bytes(), after.read_bytes()), "unlabelled")
    assert pair.provenance["conversation"] == [["What is new?", "a tree"], ["Where?", "left"]]
    assert single.images == (before.read_bytes(),)
    put(table, [entry(["a.png", "b.png"], "<image>\n<image>\nWhat?", "Which tag?", "the tag <image>")])
    assert summarize("my_pairs", tmp_path)["notes"] == []  # The notes are about the columns of a table.
    for images, question, message in ((["a.png", "b.png"], "<image> What?", "must have two <image>, got 1; write both"),
                                      (["a.png", "b.png", "a.png"], "What?", "must have at most two images, got 3")):
        put(table, [entry(images, question)])
        with pytest.raises(ValueError, match=rf"differences.json entry 1 \(line \d+\): a conversation .*{message}"):
            summarize("my_pairs", tmp_path)
