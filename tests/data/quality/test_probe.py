from __future__ import annotations

import io
import unicodedata
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from damaged_images import chunk, inserted
from PIL import Image
from tiny_diffusion import save_clip

from onediff.config import Runtime
from onediff.data.embedding import Embedder
from onediff.data.quality.probe import (
    SCHEMA,
    count_pairs,
    difference_hash,
    is_bad_text,
    probe_folders,
    probe_record,
    read_group,
    write_table,
)
from onediff.data.record import Record, read_records, shards, write_shards
from onediff.inputs.images import open_image


def png(seed: int, height: int = 37, width: int = 53) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(256, size=(height, width, 3)).astype(np.uint8)).save(
        file, "PNG"
    )
    return file.getvalue()


def record(number: int) -> Record:
    return Record(f"p{number}", "edits", "train", f"g{number}", png(2 * number), png(2 * number + 1),
                  ["darken the image", "make it dark", "less light"], "What changed?", "darken", {"seed": [number]})


def probed(folder: Path, *, workers: int = 1, clip: str | None = None) -> list[dict[str, Any]]:
    runtime = Runtime(workers=workers, device="cpu")
    tables = probe_folders({"own": folder}, max_megapixels=64, clip=clip, runtime=runtime)
    return [row for table in tables for row in table.to_pylist()]


def read_by_groups(folder: Path) -> Iterator[Record]:
    """Yield the records of all row groups of all shards in a folder."""
    return (record for path in shards(folder)
            for group in range(pq.ParquetFile(path).num_row_groups) for record in read_group(path, group))


def test_a_row_describes_the_images_and_the_references_of_a_pair() -> None:
    row = probe_record(record(3), max_megapixels=64)
    assert set(row) == set(SCHEMA.names)
    assert row["decodes"]
    assert (row["width_before"], row["height_before"], row["width_after"], row["height_after"]) == (53, 37, 53, 37)
    assert (row["num_references"], row["min_words"], row["max_words"], row["num_empty_references"]) == (3, 2, 3, 0)
    assert (row["error"], row["mode"], row["has_bad_text"]) == ("", "RGB", False)
    assert (row["num_images"], row["num_missing_images"], row["clip_distance"]) == (2, 0, None)


def test_a_row_contains_the_published_file_names_and_the_official_split() -> None:
    provenance = {"names": ["a.jpg", "b.png"], "official_split": "valid"}
    row = probe_record(replace(record(3), provenance=provenance), max_megapixels=64, listed_as="own")
    assert [row[name] for name in ("name_before", "name_after", "official_split", "listed_as")] == [
        "a.jpg", "b.png", "valid", "own"]
    assert probe_record(record(3), max_megapixels=64)["name_after"] == ""


def test_an_empty_reference_counts_as_a_fault_unless_the_published_dataset_contains_it() -> None:
    for references, provenance, number in (([""], {}, 1), ([""], {"empty_references": 1}, 0),
                                           (["x", ""], {"empty_references": 1}, 1)):
        row = probe_record(replace(record(3), references=references, provenance=provenance), max_megapixels=64)
        assert row["num_empty_references"] == number


def test_the_distance_is_the_mean_absolute_difference_of_the_two_images_at_32_by_32_pixels() -> None:
    before, after = (np.random.default_rng(seed).integers(256, size=(32, 32)).astype(np.uint8) for seed in (5, 6))
    files = []
    for cells in (before, after):
        file = io.BytesIO()
        Image.fromarray(np.kron(cells, np.ones((3, 5), dtype=np.uint8))).save(file, "PNG")
        files.append(file.getvalue())
    row = probe_record(replace(record(3), before=files[0], after=files[1]), max_megapixels=64)
    assert row["distance"] == pytest.approx(np.abs(before.astype(float) - after.astype(float)).mean())


@pytest.mark.parametrize("number", [0, 1])
def test_general_instruction_data_with_one_image_or_none_has_no_fault(number: int) -> None:
    general = replace(record(3), before=png(1) if number else b"", after=b"", num_images=number,
                      instruction="What is this?\nAnswer in a word.", references=["First.\n\tSecond. " * 100])
    row = probe_record(general, max_megapixels=64)
    assert (row["decodes"], row["error"], row["num_images"], row["has_bad_text"]) == (True, "", number, False)
    assert (row["width_before"], row["width_after"], row["hash_after"]) == (53 * number, 0, "")
    assert row["distance"] is None
    assert probe_record(replace(general, instruction="a\x07"), max_megapixels=64)["has_bad_text"]


def test_metadata_that_cannot_be_read_is_no_error_but_is_noted() -> None:
    broken = inserted(png(6), chunk(b"eXIf", b"no EXIF at all"))
    row = probe_record(replace(record(3), after=broken), max_megapixels=64)
    assert (row["decodes"], row["error"], row["mode"]) == (True, "", "RGB")
    assert row["notes"] == "after: EXIF cannot be read, so the orientation is unknown"
    assert row["hash_before"] == row["hash_after"]
    assert probe_record(record(3), max_megapixels=64)["notes"] == ""


def test_the_row_of_a_pair_contains_the_name_of_a_missing_image() -> None:
    pair = replace(record(3), after=b"", provenance={"names": ["1001.png", "1001_2.png"], "missing": ["1001_2.png"]})
    row = probe_record(pair, max_megapixels=64)
    assert (row["decodes"], row["num_missing_images"]) == (False, 1)
    assert row["error"] == "after: 1001_2.png is missing"
    assert row["width_before"] == 53
    assert row["distance"] is None
    both = replace(pair, before=b"", provenance={"missing": ["1001.png", "1001_2.png"]})
    assert probe_record(both, max_megapixels=64)["num_missing_images"] == 2


@pytest.mark.parametrize(("text", "language"), [
    ("the bird on the left has a longer beak and a darker tail than the other one", "en"),
    ("l'oiseau de gauche a un bec plus long et une queue plus sombre que celui de droite", "fr"),
    ("gone", ""),  # One word is too short to detect a language.
])
def test_the_language_of_the_captions_is_detected_if_they_have_enough_words(text: str, language: str) -> None:
    row = probe_record(replace(record(3), references=[text]), max_megapixels=64)
    assert row["language"] == language
    assert (row["language_score"] is None) == (language == "")


def test_bad_text_contains_a_control_character_a_surrogate_or_a_line_separator() -> None:
    for code in range(0x11000):
        is_bad = chr(code) == "\ufffd" or unicodedata.category(chr(code)) in ("Cc", "Cs", "Zl", "Zp")
        assert is_bad_text(f"a{chr(code)}b") == is_bad, hex(code)


def test_the_difference_hash_equals_a_cell_by_cell_reference() -> None:
    cells = np.random.default_rng(5).integers(256, size=(8, 9)).astype(np.uint8)
    bits = "".join("1" if cells[row, k] < cells[row, k + 1] else "0" for row in range(8) for k in range(8))
    picture = np.kron(cells, np.ones((11, 13), dtype=np.uint8))
    assert difference_hash(Image.fromarray(picture).convert("RGB")) == int(bits, 2)
    noisy = np.clip(picture + np.random.default_rng(6).integers(0, 5, picture.shape), 0, 255).astype(np.uint8)
    assert (difference_hash(Image.fromarray(noisy)) ^ int(bits, 2)).bit_count() <= 3


def test_equal_pixels_in_files_of_different_formats_have_equal_hashes() -> None:
    pair = record(3)
    file = io.BytesIO()
    Image.open(io.BytesIO(pair.before)).save(file, "BMP")
    row = probe_record(replace(pair, after=file.getvalue()), max_megapixels=64)
    assert row["hash_before"] == row["hash_after"]
    assert row["phash_before"] == row["phash_after"]
    assert row["distance"] == 0


def test_the_row_of_a_pair_with_bad_images_contains_the_reasons() -> None:
    row = probe_record(replace(record(3), before=png(1)[:90], after=b""), max_megapixels=64)
    assert not row["decodes"]
    assert "before image: " in row["error"]
    assert "after image: not an image" in row["error"]
    assert (row["width_before"], row["hash_after"], row["mode"]) == (0, "", "")
    assert "megapixels, at most 0.001" in probe_record(record(3), max_megapixels=0.001)["error"]


@pytest.mark.parametrize("text", ["a\rb", "a\nb", "a\u2028b", "a\x85b", "a\vb", "a\ufffdb", "a\x00b"])
def test_a_caption_with_bad_text_is_a_fault(text: str) -> None:
    assert is_bad_text(text)
    assert probe_record(replace(record(3), references=[text]), max_megapixels=64)["has_bad_text"]


def test_accents_non_breaking_spaces_japanese_and_emoji_are_not_bad_text() -> None:
    assert not any(is_bad_text(text) for text in ["déjà vu", "a\u00a0b", "猫が消えた", "it's gone 🐈", ""])


def test_empty_captions_are_counted() -> None:
    row = probe_record(replace(record(3), references=["", "  ", "gone"]), max_megapixels=64)
    assert (row["num_references"], row["num_empty_references"], row["min_words"]) == (3, 2, 0)


def test_reading_row_groups_gives_the_records_of_the_shards(tmp_path: Path) -> None:
    general = replace(record(7), num_images=1, after=b"")
    records = [*(record(k) for k in range(7)), general]
    write_shards(records, tmp_path, "train", shard_pairs=5)
    assert list(read_by_groups(tmp_path)) == list(read_records(tmp_path)) == records
    assert count_pairs(tmp_path) == 8


def test_one_process_and_two_processes_write_equal_tables_with_one_row_for_each_pair(tmp_path: Path) -> None:
    write_shards((record(k) for k in range(131)), tmp_path / "own", "train", shard_pairs=100)
    files, folders = [], {"own": tmp_path / "own"}
    for workers in (1, 2):
        tables = probe_folders(folders, max_megapixels=64, clip=None, runtime=Runtime(workers=workers))
        path = tmp_path / "probe" / f"{workers}.parquet"
        write_table(tables, path)
        files.append(path.read_bytes())
    assert files[0] == files[1]
    rows = pq.read_table(path).to_pylist()
    assert [row["pair_id"] for row in rows] == [f"p{k}" for k in range(131)]
    assert rows[5] == probe_record(record(5), max_megapixels=64, listed_as="own")
    assert sorted(file.name for file in path.parent.iterdir()) == ["1.parquet", "2.parquet"]


def test_a_table_that_could_not_be_written_completely_leaves_no_file(tmp_path: Path) -> None:
    def tables() -> Iterator[pa.Table]:
        yield pa.Table.from_pylist([probe_record(record(0), max_megapixels=64)], schema=SCHEMA)
        raise OSError("No space left on device")

    with pytest.raises(OSError, match=r"probe\.parquet could not be written: the disk is full"):
        write_table(tables(), tmp_path / "probe.parquet")
    assert list(tmp_path.iterdir()) == []


def test_the_clip_distance_is_one_minus_the_cosine_similarity(tmp_path: Path) -> None:
    clip = save_clip(tmp_path / "clip")
    records = [record(k) for k in range(19)]
    records[3] = replace(records[3], after=b"")
    records[4] = replace(records[4], after=b"", num_images=1)
    records[5] = replace(records[5], after=records[5].before)
    write_shards(records, tmp_path / "own", "train", shard_pairs=50)
    rows = probed(tmp_path / "own", clip=clip)
    assert [row["pair_id"] for row in rows if row["clip_distance"] is None] == ["p3", "p4"]
    embedder = Embedder(clip, "cpu")
    for row, pair in zip(rows, records, strict=True):
        if row["clip_distance"] is not None:
            before, after = embedder.images([open_image(pair.before), open_image(pair.after)])
            assert row["clip_distance"] == pytest.approx(1 - before @ after, abs=2e-5)
    assert rows[5]["clip_distance"] == pytest.approx(0, abs=1e-5)


def test_a_caption_that_is_not_utf8_gives_a_row_with_a_fault_instead_of_an_error(tmp_path: Path) -> None:
    write_shards([record(0), record(1)], tmp_path, "train", shard_pairs=5)
    path = tmp_path / "train-00000.parquet"
    table = pq.read_table(path)
    texts = pa.array([[b"fine"], [b"caf\xe9", None]], pa.list_(pa.binary()))
    column = pa.ListArray.from_arrays(texts.offsets, pa.Array.from_buffers(pa.string(), 3, texts.values.buffers()))
    pq.write_table(table.set_column(table.column_names.index("references"), "references", column), path)
    rows = probed(tmp_path)
    assert [row["has_bad_text"] for row in rows] == [False, True]
    assert [row["num_empty_references"] for row in rows] == [0, 1]


def test_a_record_without_images_and_captions_gives_a_row_with_faults_instead_of_an_error(tmp_path: Path) -> None:
    write_shards([record(0)], tmp_path, "train", shard_pairs=5)
    path = tmp_path / "train-00000.parquet"
    table = pq.read_table(path)
    empty = pa.table({name: pa.nulls(1, table.schema.field(name).type) for name in table.column_names})
    pq.write_table(empty, path)
    (row,) = probed(tmp_path)
    assert (row["pair_id"], row["decodes"], row["num_references"], row["num_images"]) == ("", False, 0, 2)


def test_missing_and_truncated_shards_and_parquet_files_with_other_columns_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        count_pairs(tmp_path)
    (tmp_path / "a.parquet").write_bytes(b"PAR1 truncated")
    with pytest.raises(ValueError, match=r"a\.parquet: not a complete Parquet file"):
        count_pairs(tmp_path)
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"must be pair_id \(string\), source .*; got text \(string\); create"):
        count_pairs(tmp_path)


def test_the_error_for_a_truncated_or_damaged_shard_contains_the_file_name(tmp_path: Path) -> None:
    write_shards([record(k) for k in range(5)], tmp_path, "train", shard_pairs=5)
    path = tmp_path / "train-00000.parquet"
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    with pytest.raises(ValueError, match=r"train-00000\.parquet: not a complete Parquet file"):
        probed(tmp_path)
    path.write_bytes(content[:1000] + bytes(len(content) // 2) + content[1000 + len(content) // 2 :])
    with pytest.raises(ValueError, match=r"train-00000\.parquet: row group 0 cannot be read \(.*\); create"):
        probed(tmp_path)


@pytest.mark.parametrize(("text", "words"), [
    ("the <image> icon is gone, </s> and <image> too", "<image> </s>"),
    ("<|im_end|> [INST] was added", "<|im_end|> [INST]"),
    ("a < b and b > a [sic] [A]", "")])
def test_words_that_look_like_control_tokens_are_listed(text: str, words: str) -> None:
    assert probe_record(replace(record(3), references=["gone", text]), max_megapixels=64)["control_words"] == words
    assert probe_record(replace(record(3), instruction=text), max_megapixels=64)["control_words"] == words
