from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
from published_sets import picture, put

from onediff.data.sources.published import Files, open_files


def index(folder: Path, *names: str) -> Files:
    """Create a file for each name, with different contents, and return the index of these files."""
    for number, name in enumerate(names):
        put(folder / name, f"content {number}")
    return Files([("", folder)])


@pytest.mark.parametrize(("published", "existing"), [
    ("1001.png", "deep/er/1001.png"),
    ("a.jpg", "a.gif"), ("a.png", "a.JPEG"), ("a.jpeg", "a.webp"), ("a.jpg", "a.bmp"), ("a.jpg", "a.tif"),
    ("1001_2.png", "01001_2.png"), ("0007.png", "7.png"), ("CLEVR_default_000012.png", "images/CLEVR_default_12.png"),
    ("CLEVR_default_12.png", "CLEVR_default_000012.jpg"), ("0.png", "000.png"),
    ("Site.com_x", "Site.com_x.jpg"),  # Some datasets publish file names without an extension.
    ("images/a.png", "mine/images/a.png"), ("images\\a.png", "images/a.png"),
])
def test_an_image_is_found_in_other_folders_with_other_leading_zeros_and_with_another_extension(
        published: str, existing: str, tmp_path: Path) -> None:
    assert index(tmp_path, existing).find(published) == tmp_path / existing


@pytest.mark.parametrize(("published", "existing"), [
    ("after/1.png", "before/1.png"), ("1.png", "1_2.png"), ("10.png", "1.png"), ("a.png", "A.png"), ("a.png", "a.txt"),
    ("coco/train2017/000000000007.jpg", "gqa/images/7.jpg"), ("a.png", "__MACOSX/a.png"), ("a.png", "._a.png"),
])
def test_a_file_with_another_name_is_not_used_instead_of_a_missing_image(published: str, existing: str,
                                                                         tmp_path: Path) -> None:
    assert index(tmp_path, existing).find(published) is None


def test_the_file_with_the_most_similar_name_is_used(tmp_path: Path) -> None:
    files = index(tmp_path, "07.jpg", "7.jpg", "07.png", "7.png", "008.gif", "8.gif")
    assert files.find("7.png") == tmp_path / "7.png"
    assert files.find("07.jpg") == tmp_path / "07.jpg"
    assert files.find("008.png") == tmp_path / "008.gif"
    with pytest.raises(ValueError, match="both match this name"):
        files.find("007.png")


def test_two_files_with_equal_names_are_refused_only_if_their_contents_differ(tmp_path: Path) -> None:
    files = index(tmp_path, "one/7.png", "two/7.png", "one/train.json", "two/train.json")
    with pytest.raises(ValueError, match=r"7\.png: .*one/7\.png and .*two/7\.png both match this name"):
        files.find("7.png")
    with pytest.raises(ValueError, match=r"train\.json: .* both match this name but have different content"):
        files.named("train.json")
    put(tmp_path / "two/7.png", "content 0")
    assert files.find("7.png") == tmp_path / "one/7.png"


def test_an_archive_is_unpacked_once_and_the_files_belong_to_the_folder_of_the_archive(tmp_path: Path) -> None:
    folder, scratch = tmp_path / "raw", tmp_path / "scratch"
    picture(tmp_path / "1.png", 1)
    (folder / "coco").mkdir(parents=True)
    with zipfile.ZipFile(folder / "coco/train2017.zip", "w") as archive:
        archive.write(tmp_path / "1.png", "train2017/0001.png")
        archive.writestr("train.json", "[]")
    path = open_files(folder, scratch).find("coco/train2017/0001.jpg")
    assert path is not None
    assert path.read_bytes() == (tmp_path / "1.png").read_bytes()
    written_at = path.stat().st_mtime_ns
    reopened = open_files(folder, scratch)
    assert reopened.require("train.json").read_text() == "[]"
    assert path.stat().st_mtime_ns == written_at


def test_links_to_folders_are_followed_and_a_link_loop_ends(tmp_path: Path) -> None:
    put(tmp_path / "far/1.png", "content")
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/images").symlink_to(tmp_path / "far")
    (tmp_path / "far/loop").symlink_to(tmp_path / "far")
    assert Files([("", tmp_path / "raw")]).find("1.png") == tmp_path / "raw/images/1.png"


def test_names_are_equal_if_only_their_accents_are_encoded_in_another_way(tmp_path: Path) -> None:
    files = index(tmp_path, "fu\u0308r/cafe\u0301.png", "na\xefve.json")
    found = tmp_path / "fu\u0308r/cafe\u0301.png"
    for name in ("f\xfcr/caf\xe9.png", "caf\xe9.png", "cafe\u0301.png", "fu\u0308r/cafe\u0301.png"):
        assert files.at(name) == files.find(name) == found
    assert files.find("caf\xe9.jpg") == found
    assert files.at("caf\xe9.jpg") is None and files.at("other/caf\xe9.png") is None
    assert files.named("nai\u0308ve.json") == tmp_path / "na\xefve.json"


def test_two_files_whose_names_look_alike_are_refused_and_both_are_shown(tmp_path: Path) -> None:
    files = index(tmp_path, "a/caf\xe9.png", "a/cafe\u0301.png")
    for find in (files.at, files.find):
        for name in ("caf\xe9.png", "a/cafe\u0301.png"):
            with pytest.raises(ValueError, match=r"accents are encoded: .*cafe\\u0301\.png' and .*caf\\xe9\.png'; ren"):
                find(name)
