"""Tests of the Makefile: when the virtual environment is created, and which environment the targets use."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MISLEADING = ("VIRTUAL_ENV", "CONDA_PREFIX", "UV_SYSTEM_PYTHON", "UV_PYTHON", "UV_PROJECT_ENVIRONMENT", "PIP_USER",
              "PIP_TARGET", "PYTHONHOME", "PYTHONPATH")
FILES = ("Makefile", "requirements.lock", "pyproject.toml")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with the Makefile and a .venv that looks completely installed."""
    folder = tmp_path / "my project ü"
    (folder / ".venv/bin").mkdir(parents=True)
    for name in FILES:
        shutil.copy(ROOT / name, folder)
    (folder / ".venv/bin/python").symlink_to(sys.executable)
    (folder / ".venv/.installed").write_text(f"{folder}/.venv\n")
    return folder


def make(folder: Path, *arguments: str, **environment: str) -> str:
    """Run make in the folder and return what it prints."""
    # The import of flows in another test sets PREFECT_HOME, which a user has not set.
    inherited = {key: value for key, value in os.environ.items() if key != "PREFECT_HOME"}
    return subprocess.run(["make", *arguments], cwd=folder, env=inherited | environment, text=True, check=True,
                          stdout=subprocess.PIPE).stdout


def is_recreated(folder: Path) -> bool:
    """Return whether `make setup` would create the virtual environment again, according to `make -n setup`."""
    return "-m venv --clear .venv" in make(folder, "-n", "setup")


def test_a_complete_environment_is_not_changed(project: Path) -> None:
    assert "Nothing to be done" in make(project, "setup")
    os.utime(project / "requirements.lock")
    assert not is_recreated(project) and "install --python .venv/bin/python -r requirements.lock" in make(
        project, "-n", "setup")


@pytest.mark.parametrize("stamp", [None, "", "/elsewhere/.venv\n"], ids=["interrupted", "of an older version", "moved"])
def test_an_incomplete_or_moved_environment_is_created_again(project: Path, stamp: str | None) -> None:
    path = project / ".venv/.installed"
    path.unlink() if stamp is None else path.write_text(stamp)
    assert is_recreated(project)


def test_an_environment_whose_python_was_removed_is_created_again(project: Path) -> None:
    (project / ".venv/bin/python").unlink()
    (project / ".venv/bin/python").symlink_to("/nowhere/python3")
    assert is_recreated(project)


def test_targets_run_in_the_environment_of_the_project_even_if_another_one_is_active(project: Path) -> None:
    printed = make(project, "--eval", "show: ; @env", "show", **dict.fromkeys(MISLEADING, "/elsewhere"))
    environment = dict(line.split("=", 1) for line in printed.splitlines() if "=" in line)
    assert not environment.keys() & set(MISLEADING)
    assert environment["PATH"].split(":")[0] == f"{project}/.venv/bin"
    assert environment["PREFECT_HOME"] == f"{project}/.onediff/prefect"


@pytest.mark.slow
def test_make_setup_installs_into_the_project_and_repairs_a_broken_environment(tmp_path: Path) -> None:
    folder, other = tmp_path / "my project ü", tmp_path / "other"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(folder)], check=True)
    subprocess.run([sys.executable, "-m", "venv", str(other)], check=True)
    before = sorted(other.rglob("*.dist-info"))
    make(folder, "setup", VIRTUAL_ENV=str(other), CONDA_PREFIX=str(other), UV_PYTHON=str(other / "bin/python"),
         UV_SYSTEM_PYTHON="1", PIP_USER="1", PATH=f"{other}/bin:{os.environ['PATH']}")
    assert sorted(other.rglob("*.dist-info")) == before
    moved = folder.rename(tmp_path / "moved")
    (moved / ".venv/lib").rename(tmp_path / "lib")
    make(moved, "setup")
    done = subprocess.run([moved / ".venv/bin/onediff", "--help"], stdout=subprocess.PIPE, check=True, text=True)
    assert "caption" in done.stdout
    (moved / ".venv/.installed").unlink()
    # Only the code of torch is removed, so pip still lists torch as installed.
    shutil.rmtree(next((moved / ".venv").glob("lib/python3*/site-packages/torch")))
    make(moved, "setup")
    assert "Nothing to be done" in make(moved, "setup")
