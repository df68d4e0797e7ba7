from __future__ import annotations

import io
import json
from pathlib import Path

from PIL import Image

from onediff import tracking
from onediff.config import Config
from onediff.data.record import Record, write_shards


def test_an_evaluation_keeps_scores_report_and_pictures_once(config: Config) -> None:
    data = _results()
    first = tracking.log_evaluation(config)
    assert tracking.log_evaluation(config) == first
    artifacts = {item.path for item in tracking.client().list_artifacts(first)}
    assert artifacts == {"metrics.json", "gate.json", "report.html", "pictures"}
    assert [item.path for item in tracking.client().list_artifacts(first, "pictures")] == [
        f"pictures/scenes-{number}.png" for number in range(4)]
    assert tracking.client().get_run(first).data.metrics == {"test/scenes.CIDEr": 2.0, "gate/scenes.CIDEr": 3.0}
    (data / "metrics.json").write_text('{"scenes": {"CIDEr": 2.5}}')
    assert tracking.log_evaluation(config) != first


def test_an_evaluation_keeps_the_figures_under_stress_where_there_are_any(config: Config) -> None:
    data = _results()
    (data / "stress.json").write_text('{"scenes": {"curves": {"noise": {"5": {"CIDEr": 1.5, "intervals": {}}}}}}')
    run_id = tracking.log_evaluation(config)
    assert tracking.log_evaluation(config) == run_id
    assert tracking.client().get_run(run_id).data.metrics["stress/scenes.curves.noise.5.CIDEr"] == 1.5
    assert "stress.json" in {item.path for item in tracking.client().list_artifacts(run_id)}


def _results() -> Path:
    data, buffer = Path("data"), io.BytesIO()
    Image.new("RGB", (7, 5), "red").save(buffer, "PNG")
    pairs = [Record(f"p{i}", "scenes", "test", f"g{i}", buffer.getvalue(), buffer.getvalue(), ["a"], "?", "none", {})
             for i in range(5)]
    write_shards(pairs, data / "diffcap", "test", shard_pairs=10)
    (data / "captions/test").mkdir(parents=True)
    (data / "captions/test/scenes.jsonl").write_text(json.dumps({"pair_id": "p0", "prediction": "no change"}) + "\n")
    (data / "metrics.json").write_text('{"scenes": {"CIDEr": 2.0, "floor": {"constant": {"CIDEr": 0.1}}}}')
    (data / "gate.json").write_text('{"scenes": {"CIDEr": 3.0}}')
    (data / "report.html").write_text("<html>")
    return data
