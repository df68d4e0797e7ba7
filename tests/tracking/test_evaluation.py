"""Tests of the MLflow run that stores the scores of an evaluation."""

from __future__ import annotations

import io
import json
from pathlib import Path

from PIL import Image

from onediff import tracking
from onediff.config import Config
from onediff.data.record import Record, write_shards
from onediff.tracking.evaluation import headline_metrics


def test_an_evaluation_logs_headline_scores_and_files_once(config: Config) -> None:
    data = _results()
    first = tracking.log_evaluation(config)
    assert tracking.log_evaluation(config) == first
    artifacts = {item.path for item in tracking.client().list_artifacts(first)}
    assert artifacts == {"metrics.json", "gate.json", "report.html", "pictures"}
    assert [item.path for item in tracking.client().list_artifacts(first, "pictures")] == [
        f"pictures/scenes-{number}.png" for number in range(4)]
    assert tracking.client().get_run(first).data.metrics == {
        "test/scenes.CIDEr": 2.0, "test/scenes.false_alarm_rate": 0.1}
    (data / "metrics.json").write_text('{"scenes": {"CIDEr": 2.5}}')
    assert tracking.log_evaluation(config) != first


def test_an_evaluation_stores_the_stress_scores_if_the_stage_ran(config: Config) -> None:
    data = _results()
    (data / "stress.json").write_text('{"scenes": {"curves": {"noise": {"5": {"CIDEr": 1.5, "intervals": {}}}}}}')
    run_id = tracking.log_evaluation(config)
    assert tracking.log_evaluation(config) == run_id
    assert "stress.json" in {item.path for item in tracking.client().list_artifacts(run_id)}


def test_the_run_of_a_retraining_gets_the_headline_scores_too(config: Config) -> None:
    _results()
    with tracking.parent_run("retrain", config) as parent:
        tracking.log_evaluation(config)
    assert tracking.client().get_run(parent.id).data.metrics["test/scenes.CIDEr"] == 2.0


def test_the_headline_scores_are_those_of_the_source_with_the_largest_weight(config: Config) -> None:
    tables = {"edits": {"CIDEr": 1.0}, "scenes_far": {"CIDEr": 2.0}, "scenes/single": {"CIDEr": 3.0, "num_pairs": 7}}
    assert config.tune.mixture["scenes"] > config.tune.mixture["edits"]
    assert headline_metrics(tables, config) == {"test/scenes/single.CIDEr": 3.0}


def _results() -> Path:
    """Write scores, captions, a report and five test pairs as the pipeline does, and return the folder `data`."""
    data, buffer = Path("data"), io.BytesIO()
    Image.new("RGB", (7, 5), "red").save(buffer, "PNG")
    pairs = [Record(f"p{i}", "scenes", "test", f"g{i}", buffer.getvalue(), buffer.getvalue(), ["a"], "?", "none", {})
             for i in range(5)]
    write_shards(pairs, data / "diffcap", "test", shard_pairs=10)
    (data / "captions/test").mkdir(parents=True)
    (data / "captions/test/scenes.jsonl").write_text(json.dumps({"pair_id": "p0", "prediction": "no change"}) + "\n")
    (data / "metrics.json").write_text('{"scenes": {"CIDEr": 2.0, "false_alarm_rate": 0.1, "words": 5.7, '
                                         '"floor": {"constant": {"CIDEr": 0.1}}}}')
    (data / "gate.json").write_text('{"scenes": {"CIDEr": 3.0}}')
    (data / "report.html").write_text("<html>")
    return data
