from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from onediff.serve.card import write_card

ROOT = Path(__file__).parents[2]
COUNTS = {split: {"scenes": {"add": 11, "none": 13}} for split in ("train", "val", "gate", "test")}
CARD = {"sources": {"scenes": {"what": "rendered from a seed", "licence": "Apache-2.0", "home": "here"}},
        "num_pairs": COUNTS, "num_quarantined": 3, "incomplete": {}, "digests": {},
        "leaks": {"num_dropped": 5, "images": 0, "groups": 0, "num_reported": 7}}

RUN = {"run_id": "r", "seconds": 90.0, "pairs_per_s": 17.0, "steps": 19}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project folder with the committed scores, a data card, and the reports of two training runs."""
    for name in ("metrics.json", "gate.json", "stress.json"):
        (tmp_path / "data").mkdir(exist_ok=True)
        shutil.copy(ROOT / "data" / name, tmp_path / "data")
    shutil.copy(ROOT / "params.yaml", tmp_path)
    write(tmp_path / "data/diffcap/card.json", CARD)
    for phase in ("align", "tune"):
        write(tmp_path / f"data/runs/{phase}.json", RUN)
    return tmp_path


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def test_the_hugging_face_hub_reads_the_scores_of_every_benchmark_from_the_card(project: Path) -> None:
    from huggingface_hub import ModelCard

    card = ModelCard.load(write_card(project / "out", root=project))
    metrics = json.loads((project / "data/metrics.json").read_text())
    results = {(result.dataset_type, result.dataset_split, result.metric_type): result.metric_value
             for result in card.data.eval_results}
    for benchmark, scores in metrics.items():
        assert results[benchmark, "test", "cider"] == pytest.approx(100 * scores["CIDEr"], abs=0.01)
    assert ("scenes", "gate", "false_alarm_rate") in results
    assert card.data.pipeline_tag == "image-to-text" and card.data.license == "other"


def test_the_card_shows_intervals_trivial_baselines_false_alarms_data_and_limits(project: Path) -> None:
    text = write_card(project / "out", root=project).read_text()
    scores = json.loads((project / "data/metrics.json").read_text())["scenes"]
    low, high = (f"{100 * bound:.1f}" for bound in scores["score_intervals"]["CIDEr"])
    assert f"{100 * scores['CIDEr']:.1f} [{low}, {high}]" in text
    assert "trivial baseline: best constant sentence" in text
    assert "| scenes | the same image twice, 200 pairs of split test |" in text
    assert "| scenes | 24 | 24 | 24 | 24 | rendered from a seed | Apache-2.0 | here |" in text
    assert "All training and test pairs were generated" in text and "scenes: weakest on `" in text
    assert not [line for line in text.splitlines() if line.startswith("|") and not line.endswith("|")]


def test_the_card_lists_the_ids_of_the_lineage_folder(project: Path) -> None:
    assert "## Lineage" not in write_card(project / "out", root=project).read_text()
    write(project / "out/lineage/lineage.json", {
        "git": {"commit": "c0ffee", "dirty": ["params.yaml"]}, "dvc_lock": "d1", "data_card": "d2",
        "runs": {"flow": "f3", "parent": None, "tune": "t4"}})
    text = write_card(project / "out", root=project).read_text()
    assert "| git commit | `c0ffee`, with uncommitted changes in params.yaml |" in text
    assert "| Prefect run, flow | `f3` |" in text and "| MLflow run, tune | `t4` |" in text and "parent" not in text


def test_an_incomplete_source_is_listed_with_the_number_of_test_pairs(project: Path) -> None:
    counts = {"test_pairs": 5, "listed_test_pairs": 7}
    write(project / "data/diffcap/card.json", CARD | {"incomplete": {"scenes": counts}})
    text = " ".join(write_card(project / "out", root=project).read_text().split())
    assert "`scenes` is incomplete" in text and "it has 5 of 7 test pairs." in text


def test_a_card_without_results_is_an_error(project: Path) -> None:
    (project / "data/stress.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"stress.json does not exist: run 'dvc repro' to create it"):
        write_card(project / "out", root=project)
