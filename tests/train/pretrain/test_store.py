from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from onediff.train.pretrain import store
from onediff.train.pretrain.examples import make_example
from onediff.train.pretrain.store import Examples, draw_shards, read_shards, shard_path


def test_examples_read_from_shards_equal_drawn_ones_and_are_drawn_once(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "SHARD", 3)
    draw_shards(tmp_path, 3, workers=1)
    written = shard_path(tmp_path, 0).stat().st_mtime_ns
    draw_shards(tmp_path, 6, workers=1)
    assert shard_path(tmp_path, 0).stat().st_mtime_ns == written
    read, drawn = read_shards(tmp_path, 6), Examples.of([make_example(seed) for seed in range(6)])
    assert len(read) == 6
    for field in fields(Examples):
        assert np.array_equal(getattr(read, field.name), getattr(drawn, field.name),
                              equal_nan=field.name == "offsets"), field.name
