"""Scoring works where only `pip install onediff-idc` was done, without its extras."""

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
    """The distributions that these bring with them, without extras."""
    distributions: set[str] = set()
    while names:
        requirement = Requirement(names.pop())
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if name in distributions or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        distributions.add(name)
        try:
            names += metadata.requires(requirement.name) or []
        except metadata.PackageNotFoundError:  # for another platform
            continue
    return distributions


@pytest.fixture(scope="module")
def absent() -> list[str]:
    """Top-level modules that a light install has not got."""
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    light = installed_by(list(project["dependencies"]))
    return [module for module, owners in metadata.packages_distributions().items() if module != "onediff"
            and not any(re.sub(r"[-_.]+", "-", owner).lower() in light for owner in owners)]


def onediff(absent: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    code = BLOCK.format(refused=absent, arguments=arguments)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=REPO)


def test_scoring_and_comparing_need_the_light_install_only(absent: list[str], tmp_path: Path) -> None:
    assert {"torch", "transformers", "pyarrow", "mlflow", "prefect", "PIL"} - {"PIL"} <= set(absent)
    predictions, truth = tmp_path / "p.jsonl", tmp_path / "r.jsonl"
    predictions.write_text("".join(json.dumps({"pair_id": k, "prediction": "the red car left"}) + "\n" for k in "ab"))
    truth.write_text("".join(json.dumps({"pair_id": k, "references": [f"the {k} car left"]}) + "\n" for k in "ab"))
    done = onediff(absent, "score", "--predictions", str(predictions), "--references", str(truth), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["num_pairs"] == 2 and json.loads(done.stdout)["BLEU-1"] == pytest.approx(0.75)
    done = onediff(absent, "compare", str(predictions), str(predictions), "--references", str(truth), "--json")
    assert json.loads(done.stdout)["CIDEr"]["p"] == 1, done.stderr


def test_what_needs_more_says_how_to_get_it(absent: list[str], tmp_path: Path) -> None:
    done = onediff(absent, "caption", "a.png", "b.png")
    assert done.returncode == 1
    assert re.match(r"onediff: this command needs the package \w+, .* pip install 'onediff-idc\[full\]'", done.stderr)
