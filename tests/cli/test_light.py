"""Tests of an installation by `pip install onediff-idc` alone, without the extra `full`: scoring must work."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

REPO = Path(__file__).parents[2]
BLOCK = """
import sys
from importlib.abc import MetaPathFinder
refused = set({refused!r})
class Absent(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in refused:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
from onediff.cli.main import main
sys.argv = ["onediff", *{arguments!r}]
main()
"""


def installed_by(names: list[str]) -> set[str]:
    """Return the given distributions and everything that they require, without extras."""
    distributions: set[str] = set()
    while names:
        requirement = Requirement(names.pop())
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if name in distributions or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        distributions.add(name)
        try:
            names += metadata.requires(requirement.name) or []
        except metadata.PackageNotFoundError:  # The requirement is for another platform.
            continue
    return distributions


@pytest.fixture(scope="module")
def absent() -> list[str]:
    """Return the top-level modules that an installation without extras does not have."""
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    light = installed_by(list(project["dependencies"]))
    return [module for module, owners in metadata.packages_distributions().items() if module != "onediff"
            and not any(re.sub(r"[-_.]+", "-", owner).lower() in light for owner in owners)]


def onediff(absent: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process in which the modules `absent` cannot be imported."""
    code = BLOCK.format(refused=absent, arguments=arguments)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=REPO)


def test_scoring_and_comparing_work_without_the_extras(absent: list[str], tmp_path: Path) -> None:
    assert {"torch", "transformers", "pyarrow", "mlflow", "prefect", "PIL"} - {"PIL"} <= set(absent)
    predictions, truth = tmp_path / "p.jsonl", tmp_path / "r.jsonl"
    predictions.write_text("".join(json.dumps({"pair_id": k, "prediction": "the red car left"}) + "\n" for k in "ab"))
    truth.write_text("".join(json.dumps({"pair_id": k, "references": [f"the {k} car left"]}) + "\n" for k in "ab"))
    completed = onediff(absent, "score", "--predictions", str(predictions), "--references", str(truth), "--json")
    assert completed.returncode == 0, completed.stderr
    scores = json.loads(completed.stdout)
    assert scores["num_pairs"] == 2 and scores["BLEU-1"] == pytest.approx(0.75)
    completed = onediff(absent, "compare", str(predictions), str(predictions), "--references", str(truth), "--json")
    assert json.loads(completed.stdout)["CIDEr"]["p"] == 1, completed.stderr


def test_a_command_that_needs_an_extra_says_how_to_install_it(absent: list[str], tmp_path: Path) -> None:
    completed = onediff(absent, "caption", "a.png", "b.png")
    assert completed.returncode == 1
    assert re.match(r"onediff: this command needs the package \w+, ", completed.stderr)
    assert "pip install 'onediff-idc[full]'" in completed.stderr


@pytest.mark.parametrize("more", [[], ["rich"]])
def test_the_help_is_grouped_without_the_extras_and_without_rich(absent: list[str], more: list[str]) -> None:
    completed = onediff([*absent, *more], "--help")
    assert completed.returncode == 0, completed.stderr
    assert "\nEvaluation:\n" in completed.stdout and "Score predicted captions against reference" in completed.stdout
