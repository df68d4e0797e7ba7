from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from onediff.config import Config
from onediff.data.record import read_table, write_shards
from onediff.data.synthesis.edits.records import edit_record
from onediff.data.synthesis.scenes.records import scene_records
from onediff.model.assemble import build
from onediff.paths import STRESS_DETAILS
from onediff.stages.stress import stress

PRESET = Path("presets/micro.yaml").resolve()
PART = STRESS_DETAILS.with_name("stress.part")
FILES = ("data/stress.json", "data/stress/scenes.jsonl", "data/stress/scenes.attention.jsonl")


def save_model(micro: Config, *, num_tokens: int) -> None:
    """Save the untrained model of the micro preset with `num_tokens` delta tokens."""
    changes = {"num_tokens": num_tokens} | ({} if num_tokens else {"fusion": None})
    delta = micro.model.delta.model_copy(update=changes)
    model, processor = build(micro.model.model_copy(update={"delta": delta}), seed=7)
    model.save_pretrained("data/models/tune")
    processor.save_pretrained("data/models/tune")


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, micro: Config) -> Path:
    """Create a project with a model and a few test pairs of each benchmark; captions are short to save time."""
    monkeypatch.chdir(tmp_path)
    text = PRESET.read_text()
    assert "max_new_tokens: 40" in text
    Path("params.yaml").write_text(text.replace("max_new_tokens: 40", "max_new_tokens: 3"))
    scenes = [record for source in ("scenes", "scenes_far") for index in range(3)
              for record in scene_records(micro, "test", index, source=source)]
    write_shards([*scenes, *(edit_record(micro, "test", index) for index in range(7))], Path("data/diffcap"), "test",
                 shard_pairs=100)
    save_model(micro, num_tokens=8)
    return tmp_path


def test_two_runs_of_the_stress_test_on_equal_data_write_equal_files(repository: Path) -> None:
    stress()
    first = [Path(name).read_bytes() for name in FILES]
    stress()
    assert [Path(name).read_bytes() for name in FILES] == first
    result = json.loads(first[0])
    # The benchmark scenes_far is left out, because its camera and light already move twice as far as in scenes.
    assert set(result) == {"scenes", "edits"}
    assert result["scenes"]["num_pairs"] == result["edits"]["num_pairs"] == 6
    assert {"area_share", "inside_share", "intervals"} <= result["scenes"]["attention"].keys()
    assert list(result["scenes"]["curves"]["jpeg_quality"]) == ["none", "20"]
    lines = [json.loads(line) for line in first[1].splitlines()]
    chosen = [line["pair_id"] for line in lines if line["trial"] == "plain"]
    all_pairs = [row["pair_id"] for row in read_table(Path("data/diffcap"), "test-*.parquet")]
    assert len(chosen) == 6 and sorted(chosen, key=all_pairs.index) == chosen
    attention_maps = [json.loads(line) for line in first[2].splitlines()]
    assert [maps["pair_id"] for maps in attention_maps] == chosen
    assert all(np.sum([maps["before"], maps["after"]]) == pytest.approx(1, abs=1e-3) for maps in attention_maps)
    assert not PART.exists()


def test_a_broken_image_stops_the_stage_which_keeps_the_results_of_the_last_run(repository: Path,
                                                                                micro: Config) -> None:
    for name in FILES:
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("result of the last run")
    records = [edit_record(micro, "test", index) for index in range(3)]
    records[1] = dataclasses.replace(records[1], after=records[1].after[:300])
    write_shards([*scene_records(micro, "test", 0), *records], Path("data/diffcap"), "test", shard_pairs=100)
    with pytest.raises(ValueError, match="corrupt or truncated image"):
        stress()
    assert [Path(name).read_text() for name in FILES] == ["result of the last run"] * 3
    assert not PART.exists()


def test_the_partial_folder_of_a_killed_stage_is_removed(repository: Path) -> None:
    PART.mkdir(parents=True)
    (PART / "partial file").touch()
    stress()
    assert sorted(path.name for path in Path("data/stress").iterdir()) == [
        "edits.attention.jsonl", "edits.jsonl", "scenes.attention.jsonl", "scenes.jsonl"]


def test_the_stress_test_of_a_model_without_delta_tokens_has_no_attention_maps(repository: Path,
                                                                               micro: Config) -> None:
    save_model(micro, num_tokens=0)
    stress()
    result = json.loads(Path("data/stress.json").read_text())
    assert "attention" not in result["scenes"] and "curves" in result["scenes"]
    assert sorted(path.name for path in Path("data/stress").iterdir()) == ["edits.jsonl", "scenes.jsonl"]


def test_missing_shards_are_refused(repository: Path) -> None:
    for path in Path("data/diffcap").glob("test-*"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"test-\*\.parquet does not exist: create it with 'dvc repro'"):
        stress()
