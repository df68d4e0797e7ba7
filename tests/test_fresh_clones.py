"""`make run` at the size of presets/micro.yaml in folders and environments that differ from a developer's."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROXY = "http://127.0.0.1:9"
PLAIN = ("PATH", "HOME", "TMPDIR", "PIP_FIND_LINKS", "PIP_CERT", "PIP_INDEX_URL", "UV_CACHE_DIR")


def make_run(folder: Path, *, umask: int = 0o022, **environment: str) -> str:
    plain = {key: value for key, value in os.environ.items() if key in PLAIN}
    done = subprocess.run(["make", "run"], cwd=folder, env=plain | environment, stdout=subprocess.PIPE, umask=umask,
                          stderr=subprocess.STDOUT, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stdout[-6000:]
    assert (folder / "data/report.html").exists() and json.loads((folder / "data/metrics.json").read_text())["scenes"]
    return done.stdout


def clone(folder: Path) -> Path:
    subprocess.run(["git", "clone", "-q", str(ROOT), str(folder)], check=True)
    shutil.copy(folder / "presets/micro.yaml", folder / "params.yaml")
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("name", "environment"), [
    ("my project ü", {"LC_ALL": "C"}), ("my project ü", {"LANG": "de_DE.UTF-8"}),
    ("proxy", {"HTTP_PROXY": PROXY, "http_proxy": PROXY, "NO_PROXY": "files.example"})])
def test_a_clone_runs(tmp_path: Path, name: str, environment: dict[str, str]) -> None:
    if "HTTP_PROXY" in environment:  # packages come through a proxy that works; the pipeline's own servers do not
        subprocess.run(["make", "setup"], cwd=clone(tmp_path / name), check=True, stdout=subprocess.DEVNULL)
        make_run(tmp_path / name, **environment)
    else:
        make_run(clone(tmp_path / name), umask=0o077, **environment)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_clone_runs_beside_an_active_environment(tmp_path: Path) -> None:
    other = tmp_path / "other"
    subprocess.run([sys.executable, "-m", "venv", str(other)], check=True)
    before = sorted(other.rglob("*.dist-info"))
    make_run(clone(tmp_path / "onediff"), VIRTUAL_ENV=str(other), CONDA_PREFIX=str(other), UV_SYSTEM_PYTHON="1",
             PATH=f"{other}/bin:{os.environ['PATH']}")
    assert sorted(other.rglob("*.dist-info")) == before


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_an_archive_without_git_runs_and_says_what_is_left_out(tmp_path: Path) -> None:
    folder = clone(tmp_path / "onediff")
    shutil.rmtree(folder / ".git")
    assert "no git commit holds this folder: there is no branch of results" in make_run(folder)
