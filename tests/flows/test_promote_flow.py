"""Tests of the flow `promote` until it asks for approval; tests/flows/test_deployments.py also gives an approval."""

from __future__ import annotations

from pathlib import Path

import pytest
from registered import add, score_again, write_rules

from flows import promote as flow
from flows import tasks
from onediff import registry


@pytest.fixture(autouse=True)
def approval_required(local_registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rules(registry.RULES, approval_h=1)
    monkeypatch.setattr(tasks, "promote", tasks.promote.fn)
    monkeypatch.setattr(flow, "notify", lambda *_, **__: None)


def test_a_version_that_passes_the_gate_only_after_it_was_assessed_is_not_promoted_without_approval(
        monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = add("a", CIDEr=3.0), add("b", CIDEr=3.5)
    case = registry.assess(first).case
    assert registry.promote(first, approved=case).promoted
    score_again(first, CIDEr=4.0)

    def refuse_then_score_the_champion_lower(version: str | None) -> registry.Verdict:
        verdict = registry.assess(version)
        score_again(first, CIDEr=3.0)
        return verdict

    monkeypatch.setattr(tasks, "assess", refuse_then_score_the_champion_lower)
    state = flow.promote.fn(second)
    assert state.is_failed() and "no approval was given" in state.message


def test_promoting_the_champion_again_needs_no_approval(monkeypatch: pytest.MonkeyPatch) -> None:
    version = add("a")
    registry.promote(version, approved=registry.assess(version).case)
    monkeypatch.setattr(tasks, "assess", tasks.assess.fn)
    assert "is the champion already" in flow.promote.fn(version).message
