from __future__ import annotations

from pathlib import Path

from damaged_images import chunk, inserted
from PIL import Image
from published_sets import picture, put

from onediff.data.sources.decoding import check_images
from onediff.data.sources.read import as_text, summarize


def test_the_message_for_a_truncated_jpeg_contains_the_file_name(tmp_path: Path) -> None:
    folder, scratch = tmp_path / "mine", tmp_path / "scratch"
    put(folder / "pairs.csv", "before,after,split\na.jpg,b.png,train\nb.png,c.jpg,train\n")
    picture(folder / "b.png", 1)
    Image.effect_noise((97, 89), 50).convert("RGB").save(folder / "a.jpg")
    content = (folder / "a.jpg").read_bytes()
    (folder / "c.jpg").write_bytes(content[:len(content) // 2])
    found = check_images("mine", folder, scratch=scratch)
    [message] = found["broken"]
    assert found["noted"] == []
    assert message.startswith(f"{folder / 'c.jpg'}: corrupt or truncated image")
    summary = summarize("mine", folder, scratch=scratch)
    assert f"broken: {message}" in as_text(summary | {"broken": [message]})
    assert "broken" not in as_text(summary | {"broken": []})


def test_a_folder_of_intact_images_gives_no_message() -> None:
    examples = Path(__file__).resolve().parents[3] / "examples/folder"
    assert check_images("mine", examples) == {"broken": [], "noted": []}


def test_an_image_whose_metadata_cannot_be_used_is_noted_and_not_broken(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    put(folder / "pairs.csv", "before,after,split\na.png,b.png,train\n")
    for name in ("a.png", "b.png"):
        picture(folder / name, 1)
    (folder / "b.png").write_bytes(inserted((folder / "b.png").read_bytes(), chunk(b"eXIf", b"no EXIF at all")))
    found = check_images("mine", folder, scratch=tmp_path / "scratch")
    message = f"{folder / 'b.png'}: EXIF cannot be read, so the orientation is unknown"
    assert found == {"broken": [], "noted": [message]}
    assert f"noted: {message}" in as_text(summarize("mine", folder, scratch=tmp_path / "scratch") | found)
