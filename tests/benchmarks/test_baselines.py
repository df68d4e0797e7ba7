"""The comparison of OneDiff with the Siamese CNN at micro size."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import baselines, seeds
from benchmarks.outcomes import TEST, WORN
from onediff.baselines.siamese_cnn import Architecture
from onediff.config import Config
from onediff.data.record import Record, write_shards
from onediff.data.synthesis.edits.records import edit_records
from onediff.eval.analysis.stress import choose
from onediff.eval.metrics.words import Predictions
from onediff.files import read_jsonl

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def project(scene_pairs: list[Record], micro: Config, tmp_path: Path,
            monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the data of seed 7 and captions of OneDiff that repeat the references."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    monkeypatch.setattr(baselines, "ARCHITECTURE", Architecture(image_px=32, channels=(5, 7, 11), width=26, heads=2,
                                                                layers=1, max_words=17))
    project = seeds.HOME / "7"
    (project / "data/captions/test").mkdir(parents=True)
    (project / "data/stress").mkdir()
    text = (ROOT / "presets/micro.yaml").read_text()
    (project / "params.yaml").write_text(text)
    edits = [record for index in range(8) for record in edit_records(micro, "test", index)]
    for split, records in (("train", scene_pairs[:4]), ("val", scene_pairs[:3]), ("test", [*scene_pairs, *edits])):
        write_shards(records, project / "data/diffcap", split, shard_pairs=100)
    said: dict[str, Predictions] = {"scenes": {record.pair_id: record.references[0] for record in scene_pairs},
                                    "edits": {record.pair_id: record.references[0] for record in edits}}
    for source, texts in said.items():
        lines = [json.dumps({"pair_id": key, "prediction": text}) for key, text in texts.items()]
        (project / f"data/captions/test/{source}.jsonl").write_text("\n".join(lines) + "\n")
    chosen = choose([vars(record) for record in scene_pairs], micro.stress.num_pairs, seed=micro.seed)
    lines = [json.dumps({"trial": trial, "pair_id": key, "prediction": said["scenes"][key]})
             for trial in ("plain", *WORN.values()) for key in chosen]
    (project / "data/stress/scenes.jsonl").write_text("\n".join(lines) + "\n")
    (seeds.HOME / "7.json").write_text(json.dumps({"cpu_minutes": 1e-4, "figures": {}}))
    yield project
    torch.set_num_threads(threads)


def test_both_cnns_are_trained_once_and_compared_with_onediff(
        project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(baselines, "TIMED_STEPS", 2)
    monkeypatch.setattr(baselines, "num_parameters", lambda model: 1_000_000)  # There is no trained OneDiff here.
    baselines.main(threads=1)
    rows = {cells[1].strip(): [cell.strip() for cell in cells[2:-1]]
            for cells in (line.split("|") for line in baselines.TABLE.read_text().splitlines()) if len(cells) > 3}
    assert rows[""][:4] == ["type", "object", "false alarms", "operation"]  # There are no swapped scenes here.
    assert rows[baselines.ONEDIFF][0] == "100.0 [100.0, 100.0]"
    assert {"Siamese CNN, equal steps", "OneDiff, tiny minus Siamese CNN, equal processor time"} < rows.keys()
    folder = baselines.HOME / "7/equal_steps"
    facts = json.loads((folder / "training.json").read_text())
    assert facts["training"]["steps"] == 12 and facts["training"]["seed"] == 7  # micro: 4 steps of align, 8 of tune
    captions = baselines.captions_of(read_jsonl(folder / "captions.jsonl"))
    assert set(captions) == {TEST, *WORN.values()}
    assert len(captions[TEST]) == len(list(baselines.test_records(project)))
    written = (folder / "training.json").stat().st_mtime_ns
    baselines.main(threads=1)
    assert (folder / "training.json").stat().st_mtime_ns == written


def test_without_trained_seeds_the_error_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"must contain at least one trained seed.*benchmarks.seeds run"):
        baselines.main()


def test_the_parameters_of_a_model_folder_are_counted() -> None:
    assert baselines.num_parameters(ROOT / "presets/backbones/tiny/vision") == pytest.approx(0.87e6, rel=0.05)
