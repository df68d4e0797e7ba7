"""Which version is candidate, champion and previous. Every change goes through the trail."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onediff import tracking
from onediff.registry import store
from onediff.registry.artifacts import MODEL_DIGEST, SCORES_DIGEST, check_whole, pair_scores
from onediff.registry.commits import NO_GIT
from onediff.registry.comparison import incomparable, not_better, too_few_groups
from onediff.registry.rules import (
    RULES,
    Case,
    Verdict,
    check_metrics,
    judge,
    load_rules,
    rules_facts,
    uncommitted,
    weighed,
)
from onediff.registry.store import CANDIDATE, CHAMPION, NAME, PREVIOUS
from onediff.registry.trail import START, Change, change, settled, trail
from onediff.registry.writer_lock import writing

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
    return _assess(version, store.aliases(), rules)


@store.plain_errors()
def promote(version: str | None = None, *, rules: Path = RULES, by: str | None = None, why: str | None = None,
            approved: Case | None = None) -> Verdict:
    """Makes a version (default: the candidate) champion if it meets the rules on split `gate` and its files are whole.

    `approved`: the case of an earlier verdict, to which a person agreed; refused without one if the rules have
    approval_h. The champion itself is left as it is. A version that was rolled back comes back only if it is named.
    Raises ValueError if there is no such version, its files are gone or changed, the case is another one than was
    approved, or another change came first.
    """
    demands = load_rules(rules)
    with writing():
        head = settled(by=by)
        wanted, old = version or store.need(head.new, CANDIDATE, REGISTER), head.new.get(CHAMPION)
        if wanted != old:
            check_whole(store.get(wanted))
        verdict = _assess(version, head.new, rules)
        if approved and approved != verdict.case:
            raise ValueError(f"the approval was for {approved}, but now it would be {verdict.case}: nothing was "
                             "promoted; start the promotion again and approve what it names")
        if demands.approval_h and not approved and verdict.promoted and wanted != old:
            raise ValueError(f"{rules}: approval_h wants a person to agree that {verdict.case} becomes champion, and "
                             "nobody was asked: 'onediff registry promote' asks")
        if not verdict.promoted:
            refused = "; ".join(verdict.reasons)[:4900]  # MLflow takes 5000 characters
            store.tag(NAME, wanted, dict(zip(REFUSED, (store.now(), refused), strict=True)))
        if not verdict.promoted or wanted == old:
            return verdict
        beats = f", better than version {old}" if old and demands.better_than_champion else ""
        reason = f"meets {rules.name}{beats}"
        _make_champion(verdict, head, by=by, why=f"{reason}: {why}" if why else reason)
    return verdict


def _make_champion(verdict: Verdict, head: Change, *, by: str | None, why: str) -> None:
    """Records the change, and removes the tags that say when and why the version was refused earlier."""
    assert verdict.case, "every verdict of _assess has one"
    wanted, old = verdict.version, head.new.get(CHAMPION)
    change("promote", {**head.new, **({PREVIOUS: old} if old else {}), CHAMPION: wanted}, upon=head, by=by, why=why,
           figures=verdict.figures, rules={"sha256": verdict.case.rules, "commit": verdict.case.commit})
    for key in REFUSED:
        if key in store.get(wanted).tags:
            tracking.client().delete_model_version_tag(NAME, wanted, key)


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


def _assess(version: str | None, now: Mapping[str, str], file: Path) -> Verdict:
    rules, of_rules = load_rules(file), rules_facts(file)
    wanted, old = version or store.need(now, CANDIDATE, REGISTER), now.get(CHAMPION)
    candidate = store.get(wanted)
    scores = gate_scores(candidate)
    check_metrics(rules, scores, file=file)
    figures = weighed(rules, scores, candidate.tags)
    case = Case(wanted, candidate.tags.get(MODEL_DIGEST, "none"), _scores_digest(candidate), old, of_rules["sha256"],
                of_rules["commit"])
    if wanted == old:
        return Verdict(wanted, True, None, ["is the champion already"], figures, case)
    pairs = pair_scores(candidate)
    reasons = [*uncommitted(of_rules, first=old is None, file=file), *_unbound(candidate, pairs),
               *judge(rules, scores, candidate.tags, without_git=old is None and of_rules["commit"] == NO_GIT),
               *too_few_groups(rules, pairs)]
    if old:
        reasons += not_better(rules, pairs, pair_scores(store.get(old)),
                              again=f"python -m flows.evaluate models:/{NAME}/{old}")
    left = _rolled_back(wanted) if version is None else None
    if left:
        reasons.append(f"it was rolled back on {left}; to take it all the same: onediff registry promote {wanted}")
    return Verdict(wanted, not reasons, old if not reasons else None, reasons, figures, case)


def _scores_digest(version: ModelVersion) -> str:
    noted = [version.tags.get(key, "") for key in (SCORES_DIGEST, "scores_gate")]
    return hashlib.sha256(json.dumps(noted).encode()).hexdigest()


def _unbound(version: ModelVersion, pairs: Mapping[str, Any]) -> list[str]:
    """Why the scores of the version cannot be used: old versions have no digest that connects scores and model (they
    can still be loaded and rolled back to), or the store has lost the scores of pairs.
    """
    again = f"score it again: python -m flows.evaluate models:/{NAME}/{version.version}"
    if MODEL_DIGEST not in version.tags or SCORES_DIGEST not in version.tags:
        return [f"no digest says that its scores are those of its model: {again}"]
    return [] if pairs else [f"its scores of pairs, scored/gate.json, are not in the store: {again}"]


def _rolled_back(version: str) -> str | None:
    """When the version lost its place to a rollback, unless it was champion again since."""
    theirs = [one for one in champion_moves() if version in (one.old.get(CHAMPION), one.new.get(CHAMPION))]
    if theirs and theirs[-1].action == "rollback" and theirs[-1].old.get(CHAMPION) == version:
        return theirs[-1].when
    return None


def champion_moves() -> list[Change]:
    """The changes of the champion that count, oldest first."""
    return [one for one in trail() if one.valid and one.old.get(CHAMPION) != one.new.get(CHAMPION)]
