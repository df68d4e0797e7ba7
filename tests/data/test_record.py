from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from onediff.data.record import Record, digest, read_records, read_table, shards, write_shards


def test_written_and_read_records_are_equal(scene_pairs: list[Record], tmp_path: Path) -> None:
    assert write_shards(scene_pairs, tmp_path, "train", shard_pairs=7) == len(scene_pairs)
    assert len(shards(tmp_path)) == -(-len(scene_pairs) // 7)
    assert list(read_records(tmp_path)) == scene_pairs


def test_two_shards_of_equal_records_have_equal_bytes(scene_pairs: list[Record], tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_shards(scene_pairs, tmp_path / name, "train", shard_pairs=100)
    assert digest(shards(tmp_path / "a")[0].read_bytes()) == digest(shards(tmp_path / "b")[0].read_bytes())


def test_the_library_datasets_reads_the_shards_and_decodes_the_images(scene_pairs: list[Record],
                                                                      tmp_path: Path) -> None:
    from datasets import load_dataset

    write_shards(scene_pairs, tmp_path / "shards", "train", shard_pairs=7)
    loaded = load_dataset("parquet", data_files=str(tmp_path / "shards/*.parquet"), split="train",
                          cache_dir=str(tmp_path / "cache"))
    assert loaded[2]["pair_id"] == scene_pairs[2].pair_id
    assert loaded[2]["references"] == scene_pairs[2].references
    assert loaded[2]["after"].tobytes() == Image.open(io.BytesIO(scene_pairs[2].after)).tobytes()


def test_records_with_one_image_or_none_are_read_by_onediff_and_by_the_library_datasets(
        scene_pairs: list[Record], tmp_path: Path) -> None:
    from datasets import load_dataset

    pair = scene_pairs[0]
    records = [pair, replace(pair, pair_id="one", after=b"", num_images=1),
               replace(pair, pair_id="none", before=b"", after=b"", num_images=0)]
    write_shards(records, tmp_path / "shards", "train", shard_pairs=7)
    assert list(read_records(tmp_path / "shards")) == records
    assert [len(record.images) for record in records] == [2, 1, 0]
    loaded = load_dataset("parquet", data_files=str(tmp_path / "shards/*.parquet"), split="train",
                          cache_dir=str(tmp_path / "cache"))
    assert [(row["before"] is None, row["after"] is None) for row in loaded] == [(False, False), (False, True),
                                                                                (True, True)]


def test_the_table_contains_all_columns_of_the_records_except_the_images(scene_pairs: list[Record],
                                                                         tmp_path: Path) -> None:
    write_shards(scene_pairs, tmp_path, "train", shard_pairs=100)
    row = read_table(tmp_path)[1]
    assert set(row) == {"pair_id", "source", "split", "group_id", "references", "instruction", "change_type",
                        "provenance", "num_images"}
    assert row["provenance"] == scene_pairs[1].provenance


def test_the_error_for_missing_shards_contains_a_cure(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"create it with 'dvc repro', or see data/README\.md"):
        shards(tmp_path)


def test_every_reader_refuses_a_damaged_shard_with_its_path_and_the_cure(scene_pairs: list[Record],
                                                                         tmp_path: Path) -> None:
    write_shards(scene_pairs, tmp_path, "train", shard_pairs=100)
    path = shards(tmp_path)[0]
    content = path.read_bytes()
    half = len(content) // 2
    for damaged, rule in ((content[:-100], "not a complete Parquet file"),
                          (content[:4] + bytes(half) + content[4 + half:], "row group 0 cannot be read")):
        path.write_bytes(damaged)
        for read in (lambda: list(read_records(tmp_path)), lambda: read_table(tmp_path)):
            with pytest.raises(ValueError, match=rf"^\S*train-00000\.parquet: {rule} \(.*with 'dvc repro'$"):
                read()
