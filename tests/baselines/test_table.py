"""The table that benchmarks/baselines.py writes to docs/baselines.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import baselines
from onediff.data.record import Record
from onediff.eval.metrics.catalog import METRICS
from onediff.eval.protocols import references_digest


@pytest.fixture
def rows(scene_pairs: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Rows of a project with a CNN that always gives one caption, and a third trivial baseline in metrics.json."""
    monkeypatch.chdir(tmp_path)
    rows = [vars(record) for record in scene_pairs]
    folder = baselines.HOME / "matched"
    folder.mkdir(parents=True)
    (folder / "training.json").write_text("{}")
    save(folder / "scenes.jsonl", {row["pair_id"]: "no change was made" for row in rows})
    figures = {**dict.fromkeys(METRICS, 0.5), "change_type_accuracy": 0.7}
    result = {**figures, "references": references_digest({row["pair_id"]: row["references"] for row in rows}),
              "score_intervals": {key: [0.4, 0.6] for key in METRICS},
              "intervals": {"change_type_accuracy": [0.6, 0.8]},
              "floor": {"constant": {}, "random_train": {}, "nearest": dict.fromkeys(METRICS, 0.25)}}
    Path("data").mkdir()
    Path("data/metrics.json").write_text(json.dumps({"scenes": result}))
    return rows


def save(path: Path, predictions: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"pair_id": key, "prediction": text}) + "\n" for key, text in predictions.items()]
    path.write_text("".join(lines))


def cells(lines: list[str], name: str) -> list[str]:
    return [cell.strip() for cell in next(line for line in lines if line.startswith(f"| {name}")).split("|")[2:-1]]


def test_a_champion_that_repeats_the_references_is_better_than_a_constant_sentence(rows: list[dict[str, Any]]) -> None:
    save(Path("data/captions/test/scenes.jsonl"), {row["pair_id"]: row["references"][0] for row in rows})
    save(baselines.HOME / "ablations/mute/scenes.jsonl", {row["pair_id"]: "no change was made" for row in rows})
    lines = baselines.section("scenes", rows, ["no change was made", "the red cube moved"])
    ours, peer = cells(lines, baselines.CHAMPION), cells(lines, "Siamese CNN")
    assert cells(lines, "")[:5] == ["BLEU-4", "METEOR", "ROUGE-L", "CIDEr", "type"]
    assert (ours[0], ours[4], peer[4]) == ("100.0 [100.0, 100.0]", "100.0 [100.0, 100.0]", "0.0 [0.0, 0.0]")
    assert cells(lines, 'best constant, "no change was made"') == peer == cells(lines, "OneDiff, mute")
    assert cells(lines, "nearest")[:4] == ["25.0"] * 4
    difference = cells(lines, "champion minus Siamese CNN")[3]
    assert float(difference.split()[0]) > 0 and float(difference.split("p ")[1]) < 0.05
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1


def test_without_captions_the_scores_of_the_champion_come_from_metrics_json(rows: list[dict[str, Any]]) -> None:
    lines = baselines.section("scenes", rows, ["no change was made"])
    assert cells(lines, baselines.CHAMPION) == ["50.0 [40.0, 60.0]"] * 4 + ["70.0 [60.0, 80.0]"]
    assert not [line for line in lines if "champion minus" in line]
    with pytest.raises(ValueError, match=r"scores of scenes must belong to the references"):
        baselines.recorded("scenes", {row["pair_id"]: row["references"] for row in rows[1:]})
