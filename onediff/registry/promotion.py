"""Which version is candidate, champion and previous. Every change goes through the trail."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onediff import tracking
from onediff.registry import store
from onediff.registry.artifacts import check_whole, pair_scores
from onediff.registry.comparison import incomparable, not_better
from onediff.registry.records import START, Change, change, settled, trail
from onediff.registry.rules import RULES, Rules, Verdict, check_metrics, judge, load_rules, weighed
from onediff.registry.store import CANDIDATE, CHAMPION, NAME, PREVIOUS
from onediff.registry.writers import writing

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

REGISTER = "register one first: 'make run', or 'dvc repro' and then 'onediff registry register'"
REFUSED = ("refused_at", "refused_because")


@store.plain_errors()
def propose(version: str, *, by: str | None = None) -> None:
    """Makes the version the candidate; of one that is it already nothing is written."""
    with writing():
        head = settled(by=by)
        if head.new.get(CANDIDATE) != version:
            store.get(version)
            change("propose", head.new | {CANDIDATE: version}, upon=head, by=by, why="registered")


@store.plain_errors()
def assess(version: str | None = None, *, rules: Path = RULES) -> Verdict:
    """What `promote` would decide now; changes nothing."""
    return _assess(version, store.aliases(), load_rules(rules), file=rules)


@store.plain_errors()
def promote(version: str | None = None, *, rules: Path = RULES, by: str | None = None,
            why: str | None = None) -> Verdict:
    """Makes a version (default: the candidate) champion if it meets the rules on split `gate` and its files are whole.

    The champion itself is left as it is. A version that was rolled back comes back only if it is named. Raises
    ValueError if there is no such version, its files are gone, or another change came first.
    """
    demands = load_rules(rules)
    with writing():
        head = settled(by=by)
        wanted, old = version or store.need(head.new, CANDIDATE, REGISTER), head.new.get(CHAMPION)
        if wanted != old:
            check_whole(store.get(wanted))
        verdict = _assess(version, head.new, demands, file=rules)
        if not verdict.promoted:
            refused = "; ".join(verdict.reasons)[:4900]  # MLflow takes 5000 characters
            store.tag(NAME, wanted, dict(zip(REFUSED, (store.now(), refused), strict=True)))
        if not verdict.promoted or wanted == old:
            return verdict
        beats = f", better than version {old}" if old and demands.better_than_champion else ""
        reason = f"meets {rules.name}{beats}"
        change("promote", {**head.new, **({PREVIOUS: old} if old else {}), CHAMPION: wanted}, upon=head, by=by,
               why=f"{reason}: {why}" if why else reason, figures=verdict.figures)
        for key in REFUSED:
            if key in store.get(wanted).tags:
                tracking.client().delete_model_version_tag(NAME, wanted, key)
    return verdict


@store.plain_errors()
def rollback(*, by: str | None = None, why: str | None = None) -> str:
    """Makes `previous` the champion again; returns its version. `previous` then is the one it had replaced, if any and
    still there. Asks no gate: what was champion is good enough to go back to.

    Raises ValueError if there is no champion, no previous one, or its files are gone; then the champion stays.
    """
    with writing():
        head = settled(by=by)
        left = store.need(head.new, CHAMPION, "nothing to roll back; 'onediff registry promote' makes one")
        back = store.need(head.new, PREVIOUS, f"version {left} is the first champion; nothing to roll back to")
        check_whole(store.get(back))
        became = next((one for one in reversed(champion_moves()) if one.new.get(CHAMPION) == back), START)
        known = {str(item.version) for item in store.all_of(NAME)} - {left}
        new = {**head.new, CHAMPION: back, PREVIOUS: became.new.get(PREVIOUS, "")}
        if new[PREVIOUS] not in known:
            del new[PREVIOUS]
        reason = f"from version {left}" + (f": {why}" if why else "")
        change("rollback", new, upon=head, by=by, why=reason, figures=became.figures)
    return back


@store.plain_errors()
def champion_to_score_again(version: str | None = None, *, rules: Path = RULES) -> str | None:
    """The champion, as models:/onediff/VERSION, if the scores of its pairs cannot be compared with those of the version
    (default: the candidate) because they are of other pairs, references or protocol. Else None.
    """
    demands, now = load_rules(rules), store.aliases()
    wanted, champion = version or store.need(now, CANDIDATE, REGISTER), now.get(CHAMPION)
    if champion is None or champion == wanted:
        return None
    ours, theirs = (pair_scores(store.get(one)) for one in (wanted, champion))
    return f"models:/{NAME}/{champion}" if incomparable(demands, ours, theirs) else None


def gate_scores(version: ModelVersion) -> dict[str, Any]:
    """Flat, as tagged at registration: {"scenes.CIDEr": 3.1, ...}."""
    return json.loads(version.tags.get("scores_gate", "{}"))


def _assess(version: str | None, now: Mapping[str, str], rules: Rules, *, file: Path) -> Verdict:
    wanted, old = version or store.need(now, CANDIDATE, REGISTER), now.get(CHAMPION)
    candidate = store.get(wanted)
    scores = gate_scores(candidate)
    check_metrics(rules, scores, file=file)
    figures = weighed(rules, scores, candidate.tags)
    if wanted == old:
        return Verdict(wanted, True, None, ["is the champion already"], figures)
    reasons = judge(rules, scores, candidate.tags)
    if old:
        reasons += not_better(rules, pair_scores(candidate), pair_scores(store.get(old)),
                              again=f"python -m flows.evaluate models:/{NAME}/{old}")
    left = _rolled_back(wanted) if version is None else None
    if left:
        reasons.append(f"it was rolled back on {left}; to take it all the same: onediff registry promote {wanted}")
    return Verdict(wanted, not reasons, old if not reasons else None, reasons, figures)


def _rolled_back(version: str) -> str | None:
    """When the version lost its place to a rollback, unless it was champion again since."""
    theirs = [one for one in champion_moves() if version in (one.old.get(CHAMPION), one.new.get(CHAMPION))]
    if theirs and theirs[-1].action == "rollback" and theirs[-1].old.get(CHAMPION) == version:
        return theirs[-1].when
    return None


def champion_moves() -> list[Change]:
    """The changes of the champion that count, oldest first."""
    return [one for one in trail() if one.valid and one.old.get(CHAMPION) != one.new.get(CHAMPION)]
