"""A stage under DVC rejects inputs that DVC does not track: another package version, or an untracked folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from onediff.repro import freshness

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the check of a stage reads. The test runs in this folder."""
    for name in ("dvc.yaml", "packages.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copy(ROOT / "presets/micro.yaml", tmp_path / "params.yaml")
    shutil.copytree(ROOT / "presets/backbones", tmp_path / "presets/backbones")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def with_param(key: str, value: object) -> None:
    """Set one key of params.yaml, such as "model.language", to another value."""
    values: dict[str, Any] = YAML(typ="safe").load(Path("params.yaml").read_text())
    node = values
    *parents, last = key.split(".")
    for part in parents:
        node = node[part]
    node[last] = value
    YAML().dump(values, Path("params.yaml"))


def with_version(package: str, wanted: str) -> None:
    """Write another version of a package into packages.yaml."""
    path, installed = Path("packages.yaml"), version(package).split("+")[0]
    path.write_text(path.read_text().replace(f'{package}: "{installed}"', f'{package}: "{wanted}"'))


@pytest.mark.parametrize("stage", ["synthesize@scenes", "probe", "align", "score", "report"])
def test_the_locked_packages_and_the_committed_backbones_are_accepted(project: Path, stage: str) -> None:
    freshness.check(stage)


def test_another_version_is_refused_by_the_stages_that_use_the_package(project: Path) -> None:
    with_version("torch", "1.0.0")
    installed = version("torch").split("+")[0]
    with pytest.raises(ValueError, match=rf"packages\.yaml: torch must be 1\.0\.0, .* but {installed} is installed; "
                                         r"'make setup' installs .*, or write"):
        freshness.check("align")
    freshness.check("score")


def test_the_label_of_a_build_is_not_part_of_the_version(project: Path) -> None:
    assert "+" not in YAML(typ="safe").load(Path("packages.yaml").read_text())["torch"]
    freshness.check("align")


@pytest.mark.parametrize(("stage", "key", "folder"), [
    ("align", "model.vision.path", "presets/backbones"), ("align", "model.language", "presets/backbones"),
    ("align", "model.delta.init", "presets/backbones"), ("probe", "data.clip", "data/pretrained"),
    ("synthesize@edits", "data.edits.photos", "data/own/edits")])
def test_a_folder_that_dvc_does_not_track_is_refused(project: Path, stage: str, key: str, folder: str) -> None:
    Path("elsewhere/mine").mkdir(parents=True)
    with_param(key, "elsewhere/mine")
    with pytest.raises(ValueError, match=rf"params\.yaml: {key}: must be inside {folder}, .* got elsewhere/mine; run "
                                         rf"'cp -r .*elsewhere/mine {folder}/' .* set {key} to {folder}/mine"):
        freshness.check(stage)
    shutil.copytree("elsewhere", folder, dirs_exist_ok=True)
    with_param(key, f"{folder}/mine")
    freshness.check(stage)


def test_a_link_to_a_folder_is_refused_because_dvc_does_not_follow_it(project: Path) -> None:
    Path("elsewhere").mkdir()
    Path("presets/backbones/mine").symlink_to(Path("elsewhere").absolute())
    with_param("model.language", "presets/backbones/mine")
    with pytest.raises(ValueError, match=r"model\.language: must be inside presets/backbones"):
        freshness.check("align")


def test_a_model_of_the_hugging_face_hub_and_a_stage_that_loads_no_backbone_are_accepted(project: Path) -> None:
    with_param("model.language", "lmsys/vicuna-7b-v1.5")
    freshness.check("align")
    Path("elsewhere").mkdir()
    with_param("model.language", "elsewhere")
    freshness.check("caption")


def test_a_stage_that_dvc_starts_fails_before_it_does_any_work(project: Path) -> None:
    with_version("pillow", "1.0.0")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "DVC_STAGE": "probe"}
    done = subprocess.run([sys.executable, "-m", "onediff.stages.probe"], env=environment, capture_output=True,
                          text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("probe: packages.yaml: pillow must be 1.0.0") and "Traceback" not in done.stderr
