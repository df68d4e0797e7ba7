"""Tests of the audit trail, the log of every alias change in the registry, also with many writers at once."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from registered import REPO, Server, add, aliases, write_rules

from onediff import registry, tracking
from onediff.registry import audit_trail
from onediff.registry.audit_trail import Change, last, settled

WORK = """
import json, sys
from onediff import registry
done, lost = 0, 0
with registry.sole_writer():
    for turn in range(int(sys.argv[1])):
        try:
            if turn % 3 == 2:
                registry.rollback(by=sys.argv[2])
            else:
                registry.promote(sys.argv[3 + turn % 2], by=sys.argv[2])
            done += 1
        except (ValueError, ConnectionError) as error:
            assert "came first" in str(error) or "has the alias previous" in str(error), error
            lost += "came first" in str(error)
print(json.dumps([done, lost]))
"""
DIES = """
import os, sys
from onediff import registry
from onediff.registry import audit_trail
# The process dies after the record is written and before the aliases are set.
audit_trail._set_aliases = lambda record: os._exit(9)
registry.promote("2")
"""


def states() -> list[tuple[dict[str, str], dict[str, str]]]:
    return [(change.old, change.new) for change in registry.trail() if change.valid]


def set_alias(alias: str, version: str) -> None:
    tracking.client().set_registered_model_alias("onediff", alias, version)


def two_champions() -> None:
    for name, score in (("a", 3.0), ("b", 3.5)):
        add(name, CIDEr=score)
        registry.promote(by="me@here")


def test_every_change_is_a_record_that_starts_from_the_state_of_the_previous_record() -> None:
    two_champions()
    registry.rollback(by="flow run red-fox", why="it lies")
    changes = registry.check_trail()
    assert [change.number for change in changes] == [1, 2, 3, 4, 5]
    assert [change.action for change in changes] == ["propose", "promote", "propose", "promote", "rollback"]
    assert [old for old, _ in states()] == [{}, *(new for _, new in states())][:-1]
    assert changes[-1].new == {"candidate": "2", "champion": "1"} and changes[-1].by == "flow run red-fox"
    assert changes[3].figures["scenes.CIDEr"] == 3.5 and changes[3].why == "meets promotion.yaml, better than version 1"
    assert re.fullmatch(r"4  20\S+  promote  champion 1 -> 2, previous - -> 1  by me@here: meets .*", str(changes[3]))
    assert changes[3].as_dict()["from"] == {"candidate": "2", "champion": "1"}


def test_the_first_change_records_the_aliases_of_a_store_without_an_audit_trail() -> None:
    two_champions()
    tracking.client().delete_registered_model("onediff-audit")
    assert registry.trail() == [] and registry.difference() is None
    assert registry.rollback() == "1"
    adopted, rolled = registry.check_trail()
    assert adopted.action == "adopted" and adopted.new == {"candidate": "2", "champion": "2", "previous": "1"}
    assert rolled.old == adopted.new


def test_an_alias_changed_outside_onediff_is_reported_and_recorded_by_the_next_change() -> None:
    two_champions()
    set_alias("champion", "1")
    for call in (registry.check_trail, lambda: pytest.fail(registry.difference() or "")):
        with pytest.raises((ValueError, pytest.fail.Exception), match="the aliases were changed outside OneDiff"):
            call()
    add("c")
    assert [change.action for change in registry.check_trail()[-2:]] == ["adopted", "propose"]
    assert registry.trail()[-2].new["champion"] == "1"
    assert aliases()["1"] == ["champion", "previous"]


def test_the_change_of_a_process_that_dies_before_setting_the_aliases_is_valid() -> None:
    add("a")
    registry.promote()
    add("b", CIDEr=3.5)
    died = subprocess.run([sys.executable, "-c", DIES], env=os.environ | {"PYTHONPATH": str(REPO)}, check=False)
    assert died.returncode == 9 and aliases() == {"1": ["champion"], "2": ["candidate"]}
    assert "a change was interrupted; the next change" in str(registry.difference())
    assert registry.promote("2").reasons == ["is the champion already"]
    assert aliases() == {"1": ["previous"], "2": ["candidate", "champion"]}
    assert [change.action for change in registry.check_trail()] == ["propose", "promote", "propose", "promote"]


def test_repair_completes_a_change_that_was_interrupted_between_two_aliases() -> None:
    two_champions()
    tracking.client().delete_model_version_tag("onediff-audit", "4", "applied")
    set_alias("champion", "1")  # The alias `previous` is set, but `champion` is not yet.
    assert registry.repair().number == 4
    assert aliases() == {"1": ["previous"], "2": ["candidate", "champion"]}
    assert registry.difference() is None and all(change.applied for change in registry.check_trail())


def test_of_two_changes_that_follow_one_record_the_second_is_refused() -> None:
    two_champions()
    seen = last(registry.trail())
    registry.rollback(by="first")
    with pytest.raises(ValueError, match=r"another change came first: record 5, rollback by first .*6 is invalid"):
        audit_trail.apply_change(Change(action="promote", new={"champion": "1"}, by="second", why=""), upon=seen)
    assert aliases() == {"1": ["champion"], "2": ["candidate"]}
    registry.promote("2")
    assert [change.valid for change in registry.check_trail()] == [True] * 5 + [False, True]


def test_a_record_that_was_sent_twice_counts_as_one_change(monkeypatch: pytest.MonkeyPatch) -> None:
    add("a")
    once = audit_trail._create_record
    monkeypatch.setattr(audit_trail, "_create_record", lambda *record: (once(*record), once(*record))[1])
    assert registry.promote().promoted
    assert [change.valid for change in registry.check_trail()] == [True, True, False]


def test_a_gap_and_a_fork_of_the_audit_trail_are_reported() -> None:
    two_champions()
    store, tags = tracking.client(), {"action": "promote", "by": "x", "why": "", "figures": "{}", "mark": "m"}
    store.create_model_version("onediff-audit", "onediff-audit:/record",
                               tags=tags | {"from": '{"champion": "7"}', "to": "{}", "follows": "4"})
    with pytest.raises(ValueError, match=r"has a fork: .* follows record 4 with champion 7"):
        registry.check_trail()
    store.delete_model_version("onediff-audit", "5")
    assert len(registry.check_trail()) == 4
    store.delete_model_version("onediff-audit", "2")
    with pytest.raises(ValueError, match="must have no gap, but record 2 is missing"):
        registry.check_trail()


def test_the_message_about_an_unreadable_record_contains_its_number() -> None:
    add("a")
    tracking.client().delete_model_version_tag("onediff-audit", "1", "to")
    with pytest.raises(ValueError, match=r"record 1 of 'onediff-audit' .* cannot be read .*restore the database"):
        registry.trail()


def test_no_record_is_written_to_reconcile_audit_trail_and_aliases_if_they_agree() -> None:
    add("a")
    before = registry.trail()
    assert settled() == before[-1] and registry.trail() == before


def contend(turns: int) -> tuple[int, int]:
    """Run four processes that change the champion at once, `turns` times each.

    Return how many changes succeeded and how many were refused because another one came first.
    """
    workers = [subprocess.Popen([sys.executable, "-c", WORK, str(turns), f"process {k}", *("12" if k % 2 else "21")],
                                env=os.environ | {"PYTHONPATH": str(REPO)}, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, text=True) for k in range(4)]
    succeeded = refused = 0
    for worker in workers:
        stdout, stderr = worker.communicate(timeout=500)
        assert worker.returncode == 0, stderr
        numbers = json.loads(stdout)
        succeeded, refused = succeeded + numbers[0], refused + numbers[1]
    return succeeded, refused


def equal_pair() -> None:
    """Register two versions, each of which may replace the other as champion."""
    write_rules(Path("mlflow/promotion.yaml"), better_than_champion=None, not_worse_than_champion={})
    for name in ("a", "b"):
        add(name)
    with registry.sole_writer():
        registry.promote("1")
        registry.promote("2")


def report(start: float, succeeded: int, refused: int) -> None:
    """Print how many changes succeeded, how many were refused, and which records the audit trail contains."""
    changes = registry.check_trail()
    print(f"\n{succeeded} changes succeeded, {refused} were refused; {len(changes)} records, of which "
          f"{sum(not change.valid for change in changes)} are invalid and "
          f"{sum(change.action == 'adopted' for change in changes)} adopted; {time.monotonic() - start:.1f} s")


def test_four_threads_at_once_leave_an_audit_trail_without_gap_or_fork() -> None:
    equal_pair()
    before = len(registry.trail())

    def work(version: str) -> None:
        for _ in range(3):
            registry.promote(version)

    threads = [threading.Thread(target=work, args=(version,)) for version in "1212"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    changes = registry.check_trail()
    assert all(change.valid and change.action == "promote" for change in changes[before:]) and len(changes) > before


@pytest.mark.slow
def test_fifty_changes_by_four_processes_at_once_leave_only_valid_records() -> None:
    equal_pair()
    start = time.monotonic()
    succeeded, refused = contend(13)
    report(start, succeeded, refused)
    assert all(change.valid for change in registry.check_trail()) and refused == 0


@pytest.mark.slow
def test_of_fifty_simultaneous_changes_on_a_server_one_change_follows_each_record(server: Server) -> None:
    with registry.sole_writer():
        equal_pair()
    start = time.monotonic()
    succeeded, refused = contend(13)
    with registry.sole_writer():
        registry.repair()  # The last two writers may have set the aliases in the wrong order.
    report(start, succeeded, refused)
    changes = registry.check_trail()
    follows = [change.follows for change in changes if change.valid]
    assert len(set(follows)) == len(follows) and refused == sum(not change.valid for change in changes) > 0
