"""Tests of the figures about a model that are measured when it is registered."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints import checkpoints, settings

from onediff.config import Config
from onediff.data.record import Record, write_shards
from onediff.data.synthesis.scenes.records import scene_records
from onediff.model.assemble import build
from onediff.ops.candidate import caption_ms


def test_the_time_of_a_caption_is_positive_and_a_missing_split_is_an_error(micro: Config, tmp_path: Path) -> None:
    model, processor = build(settings(micro, *checkpoints(tmp_path, "clip", "llama")), seed=3)
    model.save_pretrained(tmp_path / "out")
    processor.save_pretrained(tmp_path / "out")
    records: list[Record] = list(scene_records(micro, "gate", 0))
    write_shards(records, tmp_path / "data", "gate", shard_pairs=100)
    assert 0 < caption_ms(tmp_path / "out", tmp_path / "data", num_pairs=3, device="cpu") < 60_000
    (tmp_path / "none").mkdir()
    with pytest.raises(FileNotFoundError, match="none"):
        caption_ms(tmp_path / "out", tmp_path / "none", device="cpu")
