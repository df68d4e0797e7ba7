"""Tests of the common part of the stages `align` and `tune`.

The trained model stays in scratch until DVC has committed the outputs of the stage. The last test limits the number
of functions between the command and the forward pass.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from onediff.config import Config, Runtime, load_params, load_runtime
from onediff.data.record import Record, write_shards
from onediff.files import write_json, write_text
from onediff.paths import DIFFCAP
from onediff.repro.lock import md5_of
from onediff.stages.training import fetch, remove_committed, train
from onediff.train.loop import TrainingRun
from onediff.train.phases import run_folder

ROOT = Path(__file__).parents[2]


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder in scratch of a finished phase `align` whose stage ended before it copied the outputs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_STAGE", "align")
    # An earlier test that trained in this process has set LOCAL_RANK.
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    (tmp_path / "presets").symlink_to(ROOT / "presets")
    write_text(Path("params.yaml"), (ROOT / "presets/micro.yaml").read_text())
    write_text(DIFFCAP / "card.json", "{}")
    folder = run_folder("align", load_params(), load_runtime())
    write_text(folder / "final/model.safetensors", "trained")
    write_text(folder / "curve.jsonl", "{}\n")
    write_json(folder / "run.json", {"run_id": "7"}, indent=1)
    write_json(folder / "status.json", {"state": "finished", "step": 3, "reason": ""})
    write_text(folder / "checkpoints/step-3/complete.json", "{}")
    return folder


def must_not_train(config: Config, runtime: Runtime, folder: Path) -> TrainingRun:
    raise AssertionError("a finished phase must not be trained again")


def test_outputs_that_dvc_did_not_commit_are_copied_from_scratch_without_training_again(finished: Path) -> None:
    """Simulate a failed commit, for example on a full disk, after which DVC removes the model and runs the stage."""
    write_text(Path("data/models/align/model.safetensors"), "of an older run")
    for _ in range(2):
        train("align", must_not_train)
        assert [path.read_text() for path in Path("data/models/align").iterdir()] == ["trained"]
        assert Path("data/curves/align.jsonl").read_text() == "{}\n"
        assert json.loads(Path("data/runs/align.json").read_text()) == {"run_id": "7"}
        assert not (finished / "checkpoints").exists()
        Path("data/models/align/model.safetensors").unlink()


def test_a_run_is_removed_from_scratch_only_after_dvc_has_committed_the_outputs(finished: Path) -> None:
    fetch("align", finished)
    write_text(Path(".dvc/config"), "")
    remove_committed("align", finished.parent)
    assert finished.exists(), "without dvc.lock, the run must be kept"
    lock = "schema: '2.0'\nstages:\n  align:\n    outs:\n    - path: data/runs/align.json\n      md5: {}\n"
    write_text(Path("dvc.lock"), lock.format("0" * 32))
    remove_committed("align", finished.parent)
    assert finished.exists(), "if dvc.lock contains another digest, the run must be kept"
    digest = md5_of(Path("data/runs/align.json"))
    write_text(Path("dvc.lock"), lock.format(digest))
    Path(".dvc/cache/files/md5").mkdir(parents=True)
    remove_committed("align", finished.parent)
    # If the disk is full during the commit, DVC writes dvc.lock, but the outputs are not in the cache.
    assert finished.exists(), "if the outputs are not in the DVC cache, the run must be kept"
    write_text(Path(".dvc/cache/files/md5") / digest[:2] / digest[2:], Path("data/runs/align.json").read_text())
    remove_committed("align", finished.parent)
    assert not finished.exists()
    assert Path("data/models/align/model.safetensors").read_text() == "trained"


def test_without_dvc_the_run_is_removed_from_scratch_at_once(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DVC_STAGE")
    fetch("align", finished)
    assert not finished.exists() and Path("data/models/align/model.safetensors").read_text() == "trained"


LOCK_FOLDER = """
import sys, time
from pathlib import Path
from onediff.files import refusing_lock
with refusing_lock(Path(sys.argv[1]) / "lock", ""):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_two_runs_cannot_train_in_one_folder_at_the_same_time(finished: Path) -> None:
    command, environment = [sys.executable, "-c", LOCK_FOLDER, str(finished)], os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"locked\n"
        message = rf"only one run may train in this folder, .* wait for process {holder.pid} on "
        with pytest.raises(ValueError, match=message):
            train("align", must_not_train)
        holder.kill()
    train("align", must_not_train)  # The operating system releases the lock of a killed process.


def test_another_seed_other_settings_or_other_data_give_another_run_folder(finished: Path) -> None:
    config, runtime = load_params(), load_runtime()
    assert run_folder("align", config, runtime) == finished
    assert run_folder("align", config.model_copy(update={"seed": config.seed + 1}), runtime) != finished
    assert config.align is not None
    longer = config.model_copy(update={"align": config.align.model_copy(update={"steps": 5})})
    assert run_folder("align", longer, runtime) != finished
    write_text(DIFFCAP / "card.json", '{"num_pairs": {}}')
    assert run_folder("align", config, runtime) != finished


STEP = """
import json, traceback
from pathlib import Path
from onediff.model.onediff import OneDiffForConditionalGeneration
from onediff.stages.align import align
from onediff.stages.command import run

forward = OneDiffForConditionalGeneration.forward

def record_stack(self, *arguments, **options):
    names = [frame.name for frame in traceback.extract_stack() if frame.filename.startswith("CODE/")]
    Path("frames.json").write_text(json.dumps(names))
    return forward(self, *arguments, **options)

OneDiffForConditionalGeneration.forward = record_stack
run(align)
"""


def test_the_command_reaches_the_forward_pass_of_the_model_through_seven_functions(
        scene_pairs: list[Record], tmp_path: Path, empty_store: Path) -> None:
    """Compare the call stack of a real training step with the expected one, so that the code stays easy to follow."""
    (tmp_path / "presets").symlink_to(ROOT / "presets")
    shutil.copy(ROOT / "presets/micro.yaml", tmp_path / "params.yaml")
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    write_shards(scene_pairs, tmp_path / DIFFCAP, "train", shard_pairs=100)
    write_text(tmp_path / DIFFCAP / "card.json", "{}")
    variables = {key: value for key, value in os.environ.items()
                 if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "DVC_STAGE")}
    variables |= {"PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path / 'mlflow.db'}"}
    subprocess.run([sys.executable, "-c", STEP.replace("CODE", str(ROOT / "onediff"))], cwd=tmp_path,
                   env=variables, check=True)
    frames = json.loads((tmp_path / "frames.json").read_text())
    assert frames == ["run", "align", "train", "run_locally", "train", "fit", "backward"]
    assert (tmp_path / "data/models/align/model.safetensors").exists()
