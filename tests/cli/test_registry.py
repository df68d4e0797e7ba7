from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from registered import add, aliases, git, write_rules
from typer.testing import CliRunner

from onediff import tracking
from onediff.cli.registry import app


@pytest.fixture(autouse=True)
def store(empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_store, "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    git("init", "--quiet")
    write_rules(Path("mlflow/promotion.yaml"))


def run(*words: str) -> str:
    done = CliRunner().invoke(app, words)
    if done.exception:
        raise done.exception
    return done.output


def test_promoting_rolling_back_and_what_the_trail_says_of_it() -> None:
    assert "no change yet" in run("trail")
    for name, score in (("a", 3.0), ("b", 3.5)):
        add(name, CIDEr=score)
        run("promote")
    assert run("promote", "--why", "again") == "version 2 is champion\n"
    assert run("rollback", "--why", "it lies") == "version 1 is champion again\n"
    assert "rollback  champion 2 -> 1, previous 1 -> -  by " in run("trail") and "it lies" in run("list")
    changes = json.loads(run("trail", "--json"))
    assert [change["to"] for change in changes][:-1] == [change["from"] for change in changes][1:]
    assert run("check") == ("5 records, no gap, no fork; MLflow's aliases are as they say; mlflow/promotion.yaml is "
                             "valid\n")


def test_where_the_rules_want_approval_the_command_names_the_case_and_asks() -> None:
    write_rules(Path("mlflow/promotion.yaml"), approval_h=1)
    add("a")
    for answer, champion in (("n", []), ("y", ["champion"])):
        asked = CliRunner().invoke(app, ["promote"], input=f"{answer}\n").output
        assert "Shall version 1 (model " in asked and aliases() == {"1": ["candidate", *champion]}


def test_a_refusal_names_every_rule() -> None:
    add("a", CIDEr=3.0, change_type_accuracy=0.1, false_alarm_rate=0.9)
    with pytest.raises(ValueError, match=r"version 1 is refused:\n  scenes\.change_type.*\n  scenes\.false_alarm_rate"):
        run("promote")


def test_an_alias_changed_outside_is_shown_and_taken_up() -> None:
    for name, score in (("a", 3.0), ("b", 3.5)):
        add(name, CIDEr=score)
        run("promote")
    tracking.client().set_registered_model_alias("onediff", "champion", "1")
    assert "the aliases were changed outside OneDiff" in run("trail")
    with pytest.raises(ValueError, match="the aliases were changed outside"):
        run("check")
    assert "adopted  champion 2 -> 1" in run("repair")
    assert "5 records" in run("check")


def test_a_champion_set_outside_that_never_met_the_gate_is_set_back() -> None:
    add("a")
    tracking.client().set_registered_model_alias("onediff", "champion", "1")
    assert "the next change sets champion back, because that version never passed the gate" in run("trail")
    assert "restored" in run("repair") and aliases() == {"1": ["candidate"]}
    assert "2 records" in run("check")
