"""What a finished training leaves in scratch, until DVC has committed it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from onediff.config import Config, Runtime, load_params, load_runtime
from onediff.files import write_json, write_text
from onediff.paths import DIFFCAP
from onediff.repro.lock import md5_of
from onediff.stages.training import fetch, remove_committed, train
from onediff.train import phases
from onediff.train.loop import Log

ROOT = Path(__file__).parents[2]


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Scratch of a finished phase `align`, whose stage ended before it fetched anything."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_STAGE", "align")
    monkeypatch.delenv("LOCAL_RANK", raising=False)  # of a training that an earlier test ran in this process
    (tmp_path / "presets").symlink_to(ROOT / "presets")
    write_text(Path("params.yaml"), (ROOT / "presets/micro.yaml").read_text())
    write_text(DIFFCAP / "card.json", "{}")
    folder = phases.run_folder("align", load_params(), load_runtime(), data=DIFFCAP)
    write_text(folder / "final/model.safetensors", "trained")
    write_text(folder / "curve.jsonl", "{}\n")
    write_json(folder / "run.json", {"run_id": "7"}, indent=1)
    write_json(folder / "status.json", {"state": "finished", "step": 3, "reason": ""})
    write_text(folder / "checkpoints/step-3/complete.json", "{}")
    return folder


def never(config: Config, runtime: Runtime, folder: Path, log: Log) -> None:
    raise AssertionError("it trains again")


def test_what_dvc_did_not_commit_is_fetched_again_and_not_trained_again(finished: Path) -> None:
    """DVC removes the new model when its commit failed, on a full disk for example, and the stage starts again."""
    write_text(Path("data/models/align/model.safetensors"), "of an older run")
    for _ in range(2):
        train("align", start=None, work=never)
        assert [path.read_text() for path in Path("data/models/align").iterdir()] == ["trained"]
        assert Path("data/curves/align.jsonl").read_text() == "{}\n"
        assert json.loads(Path("data/runs/align.json").read_text()) == {"run_id": "7"}
        assert not (finished / "checkpoints").exists()
        Path("data/models/align/model.safetensors").unlink()


def test_what_dvc_committed_is_removed_from_scratch(finished: Path) -> None:
    fetch("align", finished)
    write_text(Path(".dvc/config"), "")
    remove_committed("align", finished.parent)
    assert finished.exists()  # there is no dvc.lock yet
    lock = "schema: '2.0'\nstages:\n  align:\n    outs:\n    - path: data/runs/align.json\n      md5: {}\n"
    write_text(Path("dvc.lock"), lock.format("0" * 32))
    remove_committed("align", finished.parent)
    assert finished.exists()
    digest = md5_of(Path("data/runs/align.json"))
    write_text(Path("dvc.lock"), lock.format(digest))
    Path(".dvc/cache/files/md5").mkdir(parents=True)
    remove_committed("align", finished.parent)
    assert finished.exists()  # the disk was full when DVC committed: it wrote dvc.lock, but not its cache
    write_text(Path(".dvc/cache/files/md5") / digest[:2] / digest[2:], Path("data/runs/align.json").read_text())
    remove_committed("align", finished.parent)
    assert not finished.exists()
    assert Path("data/models/align/model.safetensors").read_text() == "trained"


def test_without_dvc_nothing_is_kept(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DVC_STAGE")
    fetch("align", finished)
    assert not finished.exists() and Path("data/models/align/model.safetensors").read_text() == "trained"
