from __future__ import annotations

from pathlib import Path

from PIL import Image
from published_sets import picture, put

from onediff.data.sources.decoding import broken_images
from onediff.data.sources.read import as_text, summarize


def test_the_message_for_a_truncated_jpeg_contains_the_file_name(tmp_path: Path) -> None:
    folder, scratch = tmp_path / "mine", tmp_path / "scratch"
    put(folder / "pairs.csv", "before,after,split\na.jpg,b.png,train\nb.png,c.jpg,train\n")
    picture(folder / "b.png", 1)
    Image.effect_noise((97, 89), 50).convert("RGB").save(folder / "a.jpg")
    content = (folder / "a.jpg").read_bytes()
    (folder / "c.jpg").write_bytes(content[:len(content) // 2])
    [message] = broken_images("mine", folder, scratch=scratch)
    assert message.startswith(f"{folder / 'c.jpg'}: corrupt or truncated image")
    summary = summarize("mine", folder, scratch=scratch)
    assert f"broken: {message}" in as_text(summary | {"broken": [message]})
    assert "broken" not in as_text(summary | {"broken": []})


def test_a_folder_of_intact_images_gives_no_message() -> None:
    examples = Path(__file__).resolve().parents[3] / "examples/folder"
    assert broken_images("mine", examples) == []
