from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from onediff.data.probe import (
    SCHEMA,
    count_pairs,
    difference_hash,
    is_bad_text,
    probe_folder,
    probe_record,
    read_raw,
    write_rows,
)
from onediff.data.record import Record, read_records, write_shards


def png(seed: int, height: int = 37, width: int = 53) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(256, size=(height, width, 3)).astype(np.uint8)).save(
        file, "PNG"
    )
    return file.getvalue()


def record(number: int) -> Record:
    return Record(f"p{number}", "edits", "train", f"g{number}", png(2 * number), png(2 * number + 1),
                  ["darken the image", "make it dark", "less light"], "What changed?", "darken", {"seed": [number]})


def test_a_row_says_what_the_pair_is() -> None:
    row = probe_record(record(3), max_megapixels=64)
    assert set(row) == set(SCHEMA.names)
    assert row["decodes"]
    assert (row["width_before"], row["height_before"], row["width_after"], row["height_after"]) == (53, 37, 53, 37)
    assert (row["num_references"], row["min_words"], row["max_words"], row["num_empty_references"]) == (3, 2, 3, 0)
    assert (row["error"], row["mode"], row["has_bad_text"]) == ("", "RGB", False)


def test_the_difference_hash_equals_a_cell_by_cell_reference() -> None:
    cells = np.random.default_rng(5).integers(256, size=(8, 9)).astype(np.uint8)
    bits = "".join("1" if cells[row, k] < cells[row, k + 1] else "0" for row in range(8) for k in range(8))
    picture = np.kron(cells, np.ones((11, 13), dtype=np.uint8))
    assert difference_hash(Image.fromarray(picture).convert("RGB")) == int(bits, 2)
    noisy = np.clip(picture + np.random.default_rng(6).integers(0, 5, picture.shape), 0, 255).astype(np.uint8)
    assert (difference_hash(Image.fromarray(noisy)) ^ int(bits, 2)).bit_count() <= 3


def test_equal_pixels_have_equal_hashes_whatever_the_file() -> None:
    pair = record(3)
    file = io.BytesIO()
    Image.open(io.BytesIO(pair.before)).save(file, "BMP")
    row = probe_record(replace(pair, after=file.getvalue()), max_megapixels=64)
    assert row["hash_before"] == row["hash_after"]
    assert row["phash_before"] == row["phash_after"]
    assert row["distance"] == 0


def test_bad_images_become_rows_with_a_reason() -> None:
    row = probe_record(replace(record(3), before=png(1)[:90], after=b""), max_megapixels=64)
    assert not row["decodes"]
    assert "before image: " in row["error"]
    assert "after image: not an image" in row["error"]
    assert (row["width_before"], row["hash_after"], row["mode"]) == (0, "", "")
    assert "megapixels, at most 0.001" in probe_record(record(3), max_megapixels=0.001)["error"]


@pytest.mark.parametrize("text", ["a\rb", "a\nb", "a\u2028b", "a\x85b", "a\vb", "a\ufffdb", "a\x00b"])
def test_bad_text_is_found(text: str) -> None:
    assert is_bad_text(text)
    assert probe_record(replace(record(3), references=[text]), max_megapixels=64)["has_bad_text"]


def test_good_text_passes() -> None:
    assert not any(is_bad_text(text) for text in ["déjà vu", "a\u00a0b", "猫が消えた", "it's gone 🐈", ""])


def test_empty_captions_are_counted() -> None:
    row = probe_record(replace(record(3), references=["", "  ", "gone"]), max_megapixels=64)
    assert (row["num_references"], row["num_empty_references"], row["min_words"]) == (3, 2, 0)


def test_reading_raw_equals_reading_records(tmp_path: Path) -> None:
    write_shards((record(k) for k in range(7)), tmp_path, "train", shard_pairs=5)
    assert list(read_raw(tmp_path)) == list(read_records(tmp_path)) == [record(k) for k in range(7)]
    assert count_pairs(tmp_path) == 7


def test_every_pair_gets_a_row_in_order_whatever_the_number_of_processes(tmp_path: Path) -> None:
    write_shards((record(k) for k in range(131)), tmp_path, "train", shard_pairs=100)
    one, two = (list(probe_folder(tmp_path, max_megapixels=64, workers=workers)) for workers in (1, 2))
    assert one == two
    assert [row["pair_id"] for row in one] == [f"p{k}" for k in range(131)]
    assert write_rows(iter(one), tmp_path / "probe" / "table.parquet") == 131
    assert pq.read_table(tmp_path / "probe" / "table.parquet").to_pylist() == one


def test_a_caption_that_is_not_utf8_is_a_bad_row_and_no_crash(tmp_path: Path) -> None:
    write_shards([record(0), record(1)], tmp_path, "train", shard_pairs=5)
    path = tmp_path / "train-00000.parquet"
    table = pq.read_table(path)
    texts = pa.array([[b"fine"], [b"caf\xe9", None]], pa.list_(pa.binary()))
    column = pa.ListArray.from_arrays(texts.offsets, pa.Array.from_buffers(pa.string(), 3, texts.values.buffers()))
    pq.write_table(table.set_column(table.column_names.index("references"), "references", column), path)
    rows = list(probe_folder(tmp_path, max_megapixels=64, workers=1))
    assert [row["has_bad_text"] for row in rows] == [False, True]
    assert [row["num_empty_references"] for row in rows] == [0, 1]


def test_a_row_without_images_or_captions_is_a_bad_row_and_no_crash(tmp_path: Path) -> None:
    write_shards([record(0)], tmp_path, "train", shard_pairs=5)
    path = tmp_path / "train-00000.parquet"
    table = pq.read_table(path)
    empty = pa.table({name: pa.nulls(1, table.schema.field(name).type) for name in table.column_names})
    pq.write_table(empty, path)
    row = next(probe_folder(tmp_path, max_megapixels=64, workers=1))
    assert (row["pair_id"], row["decodes"], row["num_references"]) == ("", False, 0)


def test_shards_that_are_missing_broken_or_foreign_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="not found"):
        count_pairs(tmp_path)
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"a\.parquet: not a whole Parquet file"):
        count_pairs(tmp_path)
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="its columns must be pair_id, source"):
        count_pairs(tmp_path)
