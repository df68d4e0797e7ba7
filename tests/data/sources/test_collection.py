from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from onediff.data.sources.collection import CaptionedImage, list_collection, load

IMAGES = [CaptionedImage(f"{k}.jpg", f"content {k}".encode(), f"caption {k}") for k in range(4)]


def write_images(folder: Path, images: list[CaptionedImage] = IMAGES) -> Path:
    folder.mkdir(exist_ok=True)
    for image in images:
        (folder / image.name).write_bytes(image.content)
    return folder


def write_csv(folder: Path, lines: list[str]) -> None:
    (folder / "captions.csv").write_text("\n".join(["image,caption", *lines]) + "\n")


def test_csv_jsonl_and_coco_annotations_give_equal_captioned_images(tmp_path: Path) -> None:
    csv = write_images(tmp_path / "csv")
    write_csv(csv, [f"{image.name},{image.caption}" for image in IMAGES])
    jsonl = write_images(tmp_path / "jsonl")
    (jsonl / "captions.jsonl").write_text("".join(json.dumps({"image": image.name, "caption": image.caption}) + "\n"
                                                  for image in IMAGES))
    coco = write_images(tmp_path / "coco")
    annotations = {"images": [{"id": k, "file_name": image.name} for k, image in enumerate(IMAGES)],
                   "annotations": [{"image_id": k, "caption": text} for k, image in enumerate(IMAGES)
                                   for text in (image.caption, "another")]}
    (coco / "captions_train.json").write_text(json.dumps(annotations))
    for folder in (csv, jsonl, coco):
        assert list(load(list_collection(folder))) == IMAGES


@pytest.mark.parametrize("struct", [True, False])
def test_images_and_captions_are_read_from_a_parquet_file_with_two_row_groups(tmp_path: Path, struct: bool) -> None:
    contents = [{"bytes": image.content, "path": None} if struct else image.content for image in IMAGES]
    table = pa.table({"image": contents, "text": [["", image.caption, "more"] for image in IMAGES]})
    pq.write_table(table, tmp_path / "part.parquet", row_group_size=3)
    loaded = list(load(list_collection(tmp_path)))
    assert [(image.content, image.caption) for image in loaded] == [(image.content, image.caption) for image in IMAGES]
    assert [image.name for image in loaded] == ["part.parquet#0.0", "part.parquet#0.1", "part.parquet#0.2",
                                                "part.parquet#1.0"]
    assert list(load(reversed(list_collection(tmp_path)))) == loaded[::-1]


def test_coco_annotations_without_captions_are_ignored(tmp_path: Path) -> None:
    write_images(tmp_path, IMAGES[:1])
    images = [{"id": 1, "file_name": "0.jpg"}]
    for name, values in (("captions", {"caption": "a dog"}), ("instances", {"bbox": [0, 0, 1, 1]})):
        (tmp_path / f"{name}_train.json").write_text(
            json.dumps({"images": images, "annotations": [{"image_id": 1} | values]}))
    assert [image.caption for image in load(list_collection(tmp_path))] == ["a dog"]


def test_images_without_a_caption_and_second_captions_of_an_image_are_ignored(tmp_path: Path) -> None:
    write_images(tmp_path)
    write_csv(tmp_path, ["0.jpg, ", "1.jpg,first", "1.jpg,second", "2.jpg,  two\twords "])
    assert [(image.name, image.caption) for image in load(list_collection(tmp_path))] == [
        ("1.jpg", "first"), ("2.jpg", "two words")]


@pytest.mark.parametrize(("lines", "message"), [
    ([], r"contains no image with a caption; add captions\.csv or captions\.jsonl, a JSON file"),
    (["9.jpg,gone", "0.jpg,there"], r"1 of 2 images do not exist \(first: 9\.jpg\)"),
    (["../0.jpg,out"], r"captions\.csv line 2: image must be a path below the folder .*, got '\.\./0\.jpg'"),
    (['0.jpg,"never closed'], r"captions\.csv line \d: wrong quotes"),
    (["0.jpg,a,b"], r"captions\.csv line 2: 2 columns expected, got 3"),
])
def test_bad_tables_are_refused(tmp_path: Path, lines: list[str], message: str) -> None:
    write_csv(write_images(tmp_path / "images"), lines)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        list(load(list_collection(tmp_path / "images")))


def test_bad_parquet_and_missing_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist: put images and captions\.csv, or Parquet"):
        list(load(list_collection(tmp_path / "nowhere")))
    pq.write_table(pa.table({"image": [b"x"], "words": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: must have a column of captions"):
        list(load(list_collection(tmp_path)))
    pq.write_table(pa.table({"url": ["x"], "caption": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: must have a column of images"):
        list(load(list_collection(tmp_path)))
    content = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"a\.parquet: not a complete Parquet file .*download it again"):
        list(load(list_collection(tmp_path)))


def test_images_with_accents_are_found_although_the_table_encodes_them_in_another_way(tmp_path: Path) -> None:
    (tmp_path / "cafe\u0301.jpg").write_bytes(b"content")
    write_csv(tmp_path, ["caf\xe9.jpg,a cup"])
    expected = [CaptionedImage("caf\xe9.jpg", b"content", "a cup")]
    assert list(load(list_collection(tmp_path))) == expected
    (tmp_path / "captions.csv").unlink()
    (tmp_path / "captions.json").write_text(json.dumps({"images": [{"id": 1, "file_name": "caf\xe9.jpg"}],
                                                        "annotations": [{"image_id": 1, "caption": "a cup"}]}))
    assert list(load(list_collection(tmp_path))) == expected
