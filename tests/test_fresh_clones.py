"""`make run` at micro size works in clones whose path, language, proxy or active environment is unusual."""

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
    """Run `make run` in a folder, check that its outputs exist, and return what it printed."""
    plain = {key: value for key, value in os.environ.items() if key in PLAIN}
    done = subprocess.run(["make", "run"], cwd=folder, env=plain | environment, stdout=subprocess.PIPE, umask=umask,
                          stderr=subprocess.STDOUT, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stdout[-6000:]
    assert (folder / "data/report.html").exists() and json.loads((folder / "data/metrics.json").read_text())["scenes"]
    return done.stdout


def clone(folder: Path) -> Path:
    """Clone this repository into a folder, with the micro preset as params.yaml."""
    subprocess.run(["git", "clone", "-q", str(ROOT), str(folder)], check=True)
    shutil.copy(folder / "presets/micro.yaml", folder / "params.yaml")
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("name", "environment"), [
    ("my project ü", {"LC_ALL": "C"}), ("my project ü", {"LANG": "de_DE.UTF-8"}),
    ("proxy", {"HTTP_PROXY": PROXY, "http_proxy": PROXY, "NO_PROXY": "files.example"})])
def test_make_run_works_in_a_clone(tmp_path: Path, name: str, environment: dict[str, str]) -> None:
    if "HTTP_PROXY" in environment:  # `make setup` downloads packages, so it runs without the proxy of this test.
        subprocess.run(["make", "setup"], cwd=clone(tmp_path / name), check=True, stdout=subprocess.DEVNULL)
        make_run(tmp_path / name, **environment)
    else:
        make_run(clone(tmp_path / name), umask=0o077, **environment)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_make_run_does_not_use_another_active_environment(tmp_path: Path) -> None:
    other = tmp_path / "other"
    subprocess.run([sys.executable, "-m", "venv", str(other)], check=True)
    before = sorted(other.rglob("*.dist-info"))
    make_run(clone(tmp_path / "onediff"), VIRTUAL_ENV=str(other), CONDA_PREFIX=str(other), UV_SYSTEM_PYTHON="1",
             PATH=f"{other}/bin:{os.environ['PATH']}")
    assert sorted(other.rglob("*.dist-info")) == before


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_make_run_works_without_git_and_says_that_no_branch_is_written(tmp_path: Path) -> None:
    folder = clone(tmp_path / "onediff")
    shutil.rmtree(folder / ".git")
    assert "no git commit holds this folder: there is no branch of results" in make_run(folder)
