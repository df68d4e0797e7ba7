from __future__ import annotations

import base64
import io
import re
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from onediff.data.browse import THUMBNAIL_PX, browse, choose
from onediff.data.record import SPLITS, Record, write_shards


def png(seed: int, height: int = 229, width: int = 331) -> bytes:
    file = io.BytesIO()
    grey = np.full((height, width, 3), seed % 256, dtype=np.uint8)
    Image.fromarray(grey).save(file, "PNG")
    return file.getvalue()


def record(number: int, source: str = "web", **changes: object) -> Record:
    values = {"pair_id": f"{source}-{number}", "source": source, "split": SPLITS[number % 4], "group_id": f"g{number}",
              "before": png(number), "after": png(number + 1), "references": [f"the {number}th cup moved"],
              "instruction": "?", "change_type": ("move", "add", "none")[number % 3], "provenance": {}} | changes
    return Record(**values)  # type: ignore[arg-type]


def articles(page: str) -> list[str]:
    return page.split("<article ")[1:]


def test_examples_are_chosen_at_equal_distances_from_each_group() -> None:
    groups = [("a",)] * 11 + [("b",)] * 2 + [("a",)] * 2
    assert choose(groups, per_group=3) == [0, 6, 11, 12, 14]
    assert choose(groups, per_group=100) == list(range(15))


def test_the_page_shows_each_chosen_record_with_split_caption_and_thumbnails(tmp_path: Path) -> None:
    write_shards([record(k) for k in range(150)], tmp_path / "shards", "train", shard_pairs=97)
    path = browse(tmp_path / "shards", tmp_path / "gallery", per_group=2)
    page = path.read_text(encoding="utf-8")
    assert len(articles(page)) == 4 * 3 * 2
    for article in articles(page):
        number = int(re.search(r"web-(\d+)", article).group(1))  # type: ignore[union-attr]
        assert f'data-split="{SPLITS[number % 4]}"' in article
        assert f"<li>the {number}th cup moved</li>" in article
        for offset, content in enumerate(re.findall(r"base64,([^\"]+)", article)):
            with Image.open(io.BytesIO(base64.b64decode(content))) as image:
                assert max(image.size) == THUMBNAIL_PX
                assert abs(int(np.asarray(image)[60, 60, 0]) - number - offset) <= 2
    assert [file.name for file in path.parent.iterdir()] == ["index.html"]


def test_the_page_contains_no_link_to_other_files_or_to_the_network(tmp_path: Path) -> None:
    write_shards([record(0)], tmp_path / "shards", "train", shard_pairs=9)
    page = browse(tmp_path / "shards", tmp_path, per_group=1).read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=\"(?!data:)|@import|url\(|https?:", page)


def test_records_with_missing_or_broken_images_are_shown_and_captions_are_escaped(tmp_path: Path) -> None:
    records = [record(0, references=["<script>alert(1)</script> & \"so\"", "long " * 10_000]),
               record(1, after=b"", references=[]), record(2, before=b"no image"),
               record(3, after=b"", num_images=1), record(4, before=b"", after=b"", num_images=0)]
    write_shards(records, tmp_path / "shards", "train", shard_pairs=9)
    page = browse(tmp_path / "shards", tmp_path, per_group=1).read_text(encoding="utf-8")
    cards = {int(re.search(r"web-(\d+)", article).group(1)): article  # type: ignore[union-attr]
             for article in articles(page)}
    script, missing, broken, single_image, no_image = (cards[number] for number in range(5))
    assert "<script>alert" not in page and "<script>alert(1)</script> & \"so\"" in unescape(script)
    assert len(page) < 60_000
    assert "missing" in missing and "no caption" in missing
    assert "not an image" in broken
    assert (single_image.count("<figure>"), no_image.count("<figure>")) == (1, 0)


def test_a_damaged_shard_is_refused_with_the_path_and_the_cure(tmp_path: Path) -> None:
    path = tmp_path / "shards/train-00000.parquet"
    write_shards([record(k) for k in range(5)], path.parent, "train", shard_pairs=5)
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    with pytest.raises(ValueError, match=r"train-00000\.parquet: not a complete Parquet file \(.*create it again"):
        browse(path.parent, tmp_path, per_group=1)


def test_a_folder_without_shards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing/\*\.parquet does not exist"):
        browse(tmp_path / "nothing", tmp_path, per_group=1)
