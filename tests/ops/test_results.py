"""Tests of the table of scores that `make run` prints, with the committed scores in brackets."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from registered import git, write_json

from onediff.ops.results import score_table

REPO = Path(__file__).resolve().parents[2]
LOCK = {"schema": "2.0", "stages": {"tune": {"cmd": "x", "params": {"params.yaml": {"tune.steps": 7}}}}}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A git repository whose commit has scores and dvc.lock, and in which the pipeline has scored a model since."""
    monkeypatch.chdir(tmp_path)
    write_json(Path("dvc.lock"), LOCK)
    write_json(Path("data/metrics.json"), {"scenes": {"CIDEr": 2.0, "METEOR": 0.4, "false_alarm_rate": 0.05}})
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "one")
    write_json(Path("data/metrics.json"), {"scenes": {"CIDEr": 2.5, "METEOR": 0.5, "false_alarm_rate": 0.0}})


@pytest.mark.usefixtures("project")
def test_the_committed_scores_are_in_brackets_if_the_parameters_are_equal() -> None:
    row = score_table().splitlines()[2].split()
    assert row == ["scenes", "250.0", "(200.0)", "50.0", "(40.0)", "-", "0.0", "(5.0)"]


@pytest.mark.usefixtures("project")
def test_scores_of_other_parameters_are_not_compared() -> None:
    write_json(Path("dvc.lock"), json.loads(json.dumps(LOCK).replace("7", "9")))
    assert score_table().splitlines()[2].split() == ["scenes", "250.0", "50.0", "-", "0.0"]
    assert "no scores with these parameters" in score_table()


@pytest.mark.usefixtures("project")
def test_the_range_over_seeds_takes_the_place_of_the_committed_scores() -> None:
    Path("docs").mkdir()
    write_json(Path("docs/seeds.json"), {"figures": {"scenes.CIDEr": {"mean": 2.1, "low": 1.9, "high": 2.25},
                                                     "scenes.false_alarm_rate": {"mean": 0, "low": 0, "high": 0.01}}})
    title, _, row = score_table().splitlines()
    assert "range over seeds" in title
    assert row.split() == ["scenes", "250.0", "(190.0-225.0)", "50.0", "(40.0)", "-", "0.0", "(0.0-1.0)"]
    write_json(Path("dvc.lock"), json.loads(json.dumps(LOCK).replace("7", "9")))
    assert "(" not in score_table().splitlines()[2]


@pytest.mark.usefixtures("project")
def test_a_source_without_test_pairs_is_named_with_the_reason() -> None:
    counts = {"train": {"mine": {"add": 5, "none": 2}, "llava_558k": {"general": 9}}, "gate": {"mine": {"add": 2}},
              "test": {"scenes": {"move": 3}}}
    write_json(Path("data/diffcap/card.json"), {"num_pairs": counts})
    assert score_table().splitlines()[3:] == [
        "mine has no score, because the split test contains none of its pairs (train 7, gate 2); in a table of your "
        "own, set the column split to test for some pairs"]


@pytest.mark.usefixtures("project")
def test_without_git_there_is_nothing_to_compare_with() -> None:
    shutil.rmtree(".git")
    assert "(" not in score_table().splitlines()[2]


@pytest.mark.usefixtures("project")
def test_missing_scores_are_reported_with_the_cure() -> None:
    Path("data/metrics.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"data/metrics\.json does not exist: run 'dvc repro score'"):
        score_table()


def test_the_table_of_the_committed_scores_fits_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)
    assert all(len(line) <= 100 for line in score_table().splitlines())
