from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from onediff import registry
from onediff.cli import scoring
from onediff.config import load_params
from onediff.data.record import Record, write_shards
from onediff.data.synthesis.scenes.records import scene_records
from onediff.paths import OWN_QUESTION, PARAPHRASED
from onediff.stages.report import report
from onediff.stages.score import score

PRESET = Path("presets/tiny.yaml").resolve()


def edit(split: str, number: int) -> Record:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), "gray").save(buffer, "PNG")
    text = ("blur the image", "brighten the image", "darken the image")[number % 3]
    where = {"new": None, "object": None, "region": [1, 2, 30, 20]}
    return Record(f"edits-{split}-{number}", "edits", split, f"photo/{number}", buffer.getvalue(), buffer.getvalue(),
                  [text], "What?", text.split()[0], where)


def _write_captions(path: Path, records: list[Record], question: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps({"pair_id": record.pair_id, "question": question,
                                    "prediction": record.references[-1]}) + "\n" for record in records)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create a project with a few pairs of each split and with the other inputs of the stages `score` and `report`.

    The predicted caption of each pair is the last reference of the pair.
    """
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_bytes(PRESET.read_bytes())
    config, folder = load_params(), Path("data/diffcap")
    for split, sources in {"train": ["scenes"], "gate": ["scenes"], "test": ["scenes", "scenes_far"]}.items():
        records = [record for source in sources for index in range(2)
                   for record in scene_records(config, split, index, source=source)]
        records += [edit(split, i) for i in range(6)]
        write_shards(records, folder, split, shard_pairs=100)
        for source in [*sources, "edits"] if split != "train" else []:
            chosen = [record for record in records if record.source == source]
            _write_captions(Path(f"data/captions/{split}/{source}.jsonl"), chosen, "What changed?")
            if split == "test":
                _write_captions(OWN_QUESTION / f"{source}.jsonl", chosen, "What is new?")
                for question in ("Q1?", "Q2?"):
                    _write_captions(PARAPHRASED / f"{source}.jsonl", chosen[:3], question)
    card = {"num_pairs": {}, "num_quarantined": 0, "pixel_difference_auc": {"scenes": 0.5, "scenes_far": None},
            "leaks": {"images": 0, "groups": 0, "near_train_images": {}, "near_bits": 3}}
    (folder / "card.json").write_text(json.dumps(card))
    Path("data/curves").mkdir()
    for phase in ("align", "tune"):
        Path(f"data/curves/{phase}.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    return tmp_path


@pytest.mark.slow
def test_score_writes_metrics_with_equal_bytes_twice_and_report_writes_a_page_and_figures(repository: Path) -> None:
    score()
    outputs = [Path("data/metrics.json"), Path("data/gate.json")]
    first = [path.read_bytes() for path in outputs]
    metrics, gate = (json.loads(content) for content in first)
    assert set(metrics) == {"scenes", "scenes_far", "edits"} and set(gate) == {"scenes", "edits"}
    assert metrics["scenes"]["change_type_accuracy"] == metrics["scenes"]["swap_consistency"] == 1
    assert metrics["scenes"]["pixel_difference_auc"] == 0.5 and "pixel_difference_auc" not in metrics["scenes_far"]
    assert metrics["edits"]["BLEU-1"] == pytest.approx(1) and 0 < metrics["edits"]["floor"]["constant"]["BLEU-1"] < 1
    for name, table in metrics.items():
        assert table["question"] == "What changed?" == gate.get(name, table)["question"]
        assert table["own_question"]["CIDEr"] == table["CIDEr"] and table["own_question"]["BLEU-1"] == table["BLEU-1"]
        assert (table["paraphrases"]["num_pairs"], table["paraphrases"]["num_questions"]) == (3, 2)
    right = {"default": 1, "mean": 1, "low": 1, "high": 1}
    assert metrics["scenes"]["paraphrases"]["change_accuracy"] == right
    assert "own_question" not in gate["scenes"] and "paraphrases" not in gate["scenes"]
    score()
    assert [path.read_bytes() for path in outputs] == first
    report()
    page = Path("data/report.html").read_text(encoding="utf-8")
    assert page.count('<article class="pair"') == 8 + 3 * 2 and "scenes-test-000000c" in page
    assert {path.name for path in Path("data/figures").iterdir()} >= {"cider-scenes.svg", "train-tune-loss.svg"}


@pytest.mark.slow
def test_onediff_report_says_why_the_page_has_no_comparison_and_names_a_damaged_file(
        repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    score()
    text = Path("data/scored/test.json").read_text()

    def output_for(cider: float, benchmark: str = "scenes") -> str:
        """Return the output of the command, if the other version has this CIDEr for each pair of the benchmark."""
        others = json.loads(text)
        others[benchmark] = others.pop("scenes")
        others[benchmark]["CIDEr"] = [cider for _ in others[benchmark]["CIDEr"]]
        monkeypatch.setattr(registry, "scored_pairs", lambda against: {benchmark: others[benchmark]})
        capsys.readouterr()
        scoring.report(against="models:/onediff/3", out=Path("r.html"))
        return capsys.readouterr().out

    assert output_for(11) == "r.html: compared with models:/onediff/3\n"
    assert "no pair has a lower CIDEr than with models:/onediff/3" in output_for(0)
    assert "models:/onediff/3 was scored on other benchmarks (mine)" in output_for(11, "mine")
    monkeypatch.setattr(registry, "scored_pairs", lambda against: json.loads(text))
    scoring.report(against="models:/onediff/3", out=Path("r.html"))
    assert "the scored model is this version (models:/onediff/3), so there is nothing" in capsys.readouterr().out
    Path("data/metrics.json").write_text("{")
    with pytest.raises(ValueError, match=r"data/metrics\.json: not valid JSON .*: run 'dvc repro' to create it"):
        scoring.report(against="models:/onediff/3", out=Path("r.html"))


def test_the_error_for_missing_captions_contains_their_pair_ids(repository: Path) -> None:
    path = Path("data/captions/test/scenes.jsonl")
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(ValueError, match=r"1 \(scenes-test-000000c\) are missing from the predictions"):
        score()
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"scenes\.jsonl does not exist"):
        score()
