"""Tests of `dvc repro` with a stage that fails: the last model is kept, and the run cache keeps the older models."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from onediff.repro.lock import md5_of

ROOT = Path(__file__).parents[2]
DVC = """
stages:
  tune:
    cmd: python tune.py
    deps: [tune.py]
    params: [settings.yaml: [value]]
    outs: [data/models/tune, data/runs/tune.json]
"""
STAGE = """
import os
from pathlib import Path
from onediff.files import new_folder, write_json
from onediff.stages.command import run

def tune() -> None:
    value = Path("settings.yaml").read_text().split()[-1]
    if value == "kill":
        os.kill(os.getpid(), 9)
    with new_folder(Path("data/models/tune")) as folder:
        (folder / "weights").write_text(value)
        if value == "bad":
            raise ValueError("no such value")
    write_json(Path("data/runs/tune.json"), value)

run(tune)
"""


def dvc(folder: Path, *arguments: str) -> tuple[int, str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "DVC_NO_ANALYTICS": "1",
                                "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    done = subprocess.run([sys.executable, "-m", "dvc", *arguments], cwd=folder, env=environment, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    return done.returncode, done.stdout


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "dvc.yaml").write_text(DVC)
    (tmp_path / "tune.py").write_text(STAGE)
    (tmp_path / "settings.yaml").write_text("value: one")
    assert dvc(tmp_path, "init", "-q", "--no-scm")[0] == 0
    assert dvc(tmp_path, "repro")[0] == 0
    return tmp_path


def repro(project: Path, value: str) -> tuple[int, str]:
    """Write `value` to settings.yaml and run `dvc repro`; return the exit code and the output."""
    (project / "settings.yaml").write_text(f"value: {value}")
    return dvc(project, "repro")


def weights(project: Path) -> str:
    return (project / "data/models/tune/weights").read_text()


def test_a_stage_that_fails_restores_the_model_that_dvc_removed_before_the_stage(project: Path) -> None:
    status, output = repro(project, "bad")
    assert status and "tune: no such value" in output and weights(project) == "one"
    assert (project / "data/runs/tune.json").read_text() == '"one"\n'
    assert not list(project.rglob("*.part"))


@pytest.mark.slow
def test_the_run_cache_restores_models_and_no_stage_changes_a_file_of_the_cache(project: Path) -> None:
    assert repro(project, "kill")[0] and weights(project) == "one"
    status, output = repro(project, "one")
    assert not status and "Running stage" not in output and weights(project) == "one"
    assert not repro(project, "two")[0] and weights(project) == "two"
    assert repro(project, "bad")[0] and weights(project) == "two"
    status, output = repro(project, "one")
    assert not status and "is cached - skipping run" in output and weights(project) == "one"
    objects = [path for path in (project / ".dvc/cache/files/md5").rglob("*") if path.is_file()]
    assert len(objects) == 6
    assert {md5_of(path) for path in objects} == {(path.parent.name + path.name).removesuffix(".dir")
                                                  for path in objects}
