"""Tests of the commands `onediff registry` with a local MLflow store."""

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
    """A folder with an empty MLflow store and promotion rules. The test runs in this folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_store, "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    git("init", "--quiet")
    write_rules(Path("mlflow/promotion.yaml"))


def run(*words: str) -> str:
    """Run `onediff registry` in this process, and return what it prints or raise the error that it raised."""
    completed = CliRunner().invoke(app, words)
    if completed.exception:
        raise completed.exception
    return completed.output


def test_promotion_and_rollback_are_in_the_audit_trail() -> None:
    assert "No alias has changed yet" in run("trail")
    for name, score in (("a", 3.0), ("b", 3.5)):
        add(name, CIDEr=score)
        run("promote")
    assert run("promote", "--why", "again") == "version 2 is champion\n"
    assert run("rollback", "--why", "it lies") == "version 1 is champion again\n"
    assert "rollback  champion 2 -> 1, previous 1 -> -  by " in run("trail") and "it lies" in run("list")
    changes = json.loads(run("trail", "--json"))
    assert [change["to"] for change in changes][:-1] == [change["from"] for change in changes][1:]
    assert run("check") == ("5 records without a gap or a fork; MLflow's aliases agree with them; "
                             "mlflow/promotion.yaml is valid\n")


def test_if_the_rules_require_approval_the_command_asks_for_it() -> None:
    write_rules(Path("mlflow/promotion.yaml"), approval_h=1)
    add("a")
    for answer, champion in (("n", []), ("y", ["champion"])):
        output = CliRunner().invoke(app, ["promote"], input=f"{answer}\n").output
        assert "Shall version 1 (model " in output and aliases() == {"1": ["candidate", *champion]}


def test_a_refusal_lists_every_failed_rule() -> None:
    add("a", CIDEr=3.0, change_type_accuracy=0.1, false_alarm_rate=0.9)
    with pytest.raises(ValueError, match=r"version 1 is refused:\n  scenes\.change_type.*\n  scenes\.false_alarm_rate"):
        run("promote")


def test_an_alias_that_was_changed_outside_is_reported_and_repair_records_it() -> None:
    for name, score in (("a", 3.0), ("b", 3.5)):
        add(name, CIDEr=score)
        run("promote")
    tracking.client().set_registered_model_alias("onediff", "champion", "1")
    assert "the aliases were changed outside OneDiff" in run("trail")
    with pytest.raises(ValueError, match="the aliases were changed outside"):
        run("check")
    assert "adopted  champion 2 -> 1" in run("repair")
    assert "5 records" in run("check")


def test_a_champion_that_was_set_outside_and_never_passed_the_gate_is_reset() -> None:
    add("a")
    tracking.client().set_registered_model_alias("onediff", "champion", "1")
    assert "sets champion back, because that version never passed the promotion rules" in run("trail")
    assert "restored" in run("repair") and aliases() == {"1": ["candidate"]}
    assert "2 records" in run("check")


@pytest.mark.parametrize("command", ["list", "trail", "repair"])
def test_reading_an_empty_registry_creates_no_database(command: str, tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'absent/mlflow.db'}")
    CliRunner().invoke(app, [command])
    assert not (tmp_path / "absent").exists()
