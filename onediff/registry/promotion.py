"""Which version is candidate, champion and previous. Every change goes through the trail."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from onediff import tracking
from onediff.files import key_of, sha256_of
from onediff.registry import store
from onediff.registry.artifacts import MODEL_DIGEST, SCORES_DIGEST, check_files, pair_scores
from onediff.registry.audit_trail import START, Change, TrailRecord, apply_change, settled, trail
from onediff.registry.facts import NO_GIT
from onediff.registry.rules import (
    RULES,
    PromotionCase,
    Verdict,
    broken_rules,
    check_metrics,
    commit_of_rules,
    failed_comparisons,
    figures_of,
    incomparable,
    load_rules,
    too_few_groups,
    uncommitted,
)
from onediff.registry.store import CANDIDATE, CHAMPION, NAME, PREVIOUS, Aliases, ModelVersion, version_of, writing

REGISTER = "register one first: 'make run', or 'dvc repro' and then 'onediff registry register'"
REFUSED = ("refused_at", "refused_because")


@tracking.plain_errors()
def propose(version: str, *, by: str | None = None) -> None:
    """Makes the version the candidate. Writes nothing if it is the candidate already."""
    with writing():
        head = settled(by=by)
        if head.new.get(CANDIDATE) != version:
            store.get(version)
            apply_change(Change(action="propose", new=head.new | {CANDIDATE: version}, by=by, why="registered"),
                         upon=head)


@tracking.plain_errors()
def promote(version: str | None = None, *, rules: Path = RULES, by: str | None = None, why: str | None = None,
            approved: PromotionCase | None = None) -> Verdict:
    """Makes a version (default: the candidate) champion if it meets the rules on split `gate` and its files are whole.

    `approved`: the case of an earlier verdict, to which a person agreed; a promotion without one is refused if the
    rules have approval_h. If the version is champion already, nothing changes. A version that was rolled back comes
    back only if it is named. Raises ValueError if there is no such version, its files are missing or changed, the case
    is another one than was approved, or another change came first.
    """
    demands = load_rules(rules)
    with writing():
        head = settled(by=by)
        candidate, champion = version or version_of(CANDIDATE, head.new, REGISTER), head.new.get(CHAMPION)
        if candidate != champion:
            check_files(store.get(candidate))
        verdict = assess(version, file=rules, aliases=head.new)
        if approved and approved != verdict.case:
            raise ValueError(f"the approval was for {approved}, but now it would be {verdict.case}: nothing was "
                             "promoted; start the promotion again and approve what it names")
        if demands.approval_h and not approved and verdict.promoted and candidate != champion:
            raise ValueError(f"{rules}: approval_h wants a person to agree that {verdict.case} becomes champion, and "
                             "nobody was asked: 'onediff registry promote' asks")
        if not verdict.promoted:
            store.set_tags(NAME, candidate, {
                REFUSED[0]: datetime.now(UTC).isoformat(timespec="seconds"),
                REFUSED[1]: "; ".join(verdict.reasons)[:4900]})  # MLflow takes at most 5000 characters
        elif candidate != champion:
            beats = f", better than version {champion}" if champion and demands.better_than_champion else ""
            reason = f"meets {rules.name}{beats}"
            _make_champion(verdict, head, by=by, why=f"{reason}: {why}" if why else reason)
    return verdict


def _make_champion(verdict: Verdict, head: TrailRecord, *, by: str | None, why: str) -> None:
    """Records the change, and removes the tags that say when and why the version was refused earlier."""
    assert verdict.case, "every verdict of assess has one"
    previous = {PREVIOUS: head.new[CHAMPION]} if head.new.get(CHAMPION) else {}
    apply_change(Change(action="promote", new={**head.new, **previous, CHAMPION: verdict.version}, by=by, why=why,
                 figures=verdict.figures, rules={"sha256": verdict.case.rules, "commit": verdict.case.commit}),
          upon=head)
    for key in REFUSED:
        if key in store.get(verdict.version).tags:
            tracking.client().delete_model_version_tag(NAME, verdict.version, key)


@tracking.plain_errors()
def rollback(*, by: str | None = None, why: str | None = None) -> str:
    """Makes `previous` the champion again and returns its version. `previous` becomes the champion that this one had
    replaced, if there was one and it still exists. The gate is not asked, because the version was champion before.

    Raises ValueError if there is no champion, no previous one, or its files are missing; then the champion stays.
    """
    with writing():
        head = settled(by=by)
        champion = version_of(CHAMPION, head.new, "nothing to roll back; 'onediff registry promote' makes one")
        back = version_of(PREVIOUS, head.new, f"version {champion} is the first champion; nothing to roll back to")
        check_files(store.get(back))
        promotion = next((record for record in reversed(champion_moves()) if record.new.get(CHAMPION) == back), START)
        new = {**head.new, CHAMPION: back, PREVIOUS: promotion.new.get(PREVIOUS, "")}
        if new[PREVIOUS] not in {str(item.version) for item in store.versions_of(NAME)} - {champion}:
            del new[PREVIOUS]
        apply_change(Change(action="rollback", new=new, by=by, figures=promotion.figures,
                            why=f"from version {champion}" + (f": {why}" if why else "")), upon=head)
    return back


@tracking.plain_errors()
def champion_to_score_again(version: str | None = None, *, rules: Path = RULES) -> str | None:
    """The champion, as models:/onediff/VERSION, if the scores of its pairs cannot be compared with those of the version
    (default: the candidate) because they are of other pairs, references or protocol. Else None.
    """
    demands, aliases = load_rules(rules), store.aliases()
    candidate, champion = version or version_of(CANDIDATE, aliases, REGISTER), aliases.get(CHAMPION)
    if champion is None or champion == candidate:
        return None
    ours, theirs = (pair_scores(store.get(number)) for number in (candidate, champion))
    return f"models:/{NAME}/{champion}" if incomparable(demands, ours, theirs) else None


def gate_scores(version: ModelVersion) -> dict[str, Any]:
    """Flat, as tagged at registration: {"scenes.CIDEr": 3.1, ...}."""
    return json.loads(version.tags.get("scores_gate", "{}"))


@tracking.plain_errors()
def assess(version: str | None = None, *, file: Path = RULES, aliases: Aliases | None = None) -> Verdict:
    """What `promote` would decide now; changes nothing. `aliases`: default: those in MLflow."""
    rules, commit = load_rules(file), commit_of_rules(file)
    aliases = store.aliases() if aliases is None else aliases
    number, champion = version or version_of(CANDIDATE, aliases, REGISTER), aliases.get(CHAMPION)
    candidate = store.get(number)
    scores, tags = gate_scores(candidate), candidate.tags
    check_metrics(rules, scores, file=file)
    figures = figures_of(rules, scores, tags)
    scores_digest = key_of([tags.get(key, "") for key in (SCORES_DIGEST, "scores_gate")])
    case = PromotionCase(number, tags.get(MODEL_DIGEST, "none"), scores_digest, champion, sha256_of(file), commit)
    if number == champion:
        return Verdict(number, True, None, ["is the champion already"], figures, case)
    pairs = pair_scores(candidate)
    reasons = [*uncommitted(commit, first=champion is None, file=file), *_unbound(candidate, pairs),
               *broken_rules(rules, scores, tags, without_git=champion is None and commit == NO_GIT),
               *too_few_groups(rules, pairs)]
    if champion:
        reasons += failed_comparisons(rules, pairs, pair_scores(store.get(champion)),
                                      again=f"python -m flows.evaluate models:/{NAME}/{champion}")
    if version is None:
        reasons += _rolled_back(number)
    return Verdict(number, not reasons, None if reasons else champion, reasons, figures, case)


def _unbound(version: ModelVersion, pairs: Mapping[str, Any]) -> list[str]:
    """Why the scores of the version cannot be used: old versions have no digest that connects scores and model (they
    can still be loaded and rolled back to), or the store has lost the scores of pairs.
    """
    again = f"score it again: python -m flows.evaluate models:/{NAME}/{version.version}"
    if MODEL_DIGEST not in version.tags or SCORES_DIGEST not in version.tags:
        return [f"no digest says that its scores are those of its model: {again}"]
    return [] if pairs else [f"its scores of pairs, scored/gate.json, are not in the store: {again}"]


def _rolled_back(version: str) -> list[str]:
    """One line if the version lost its place to a rollback and was not champion again since."""
    moves = [record for record in champion_moves()
             if version in (record.old.get(CHAMPION), record.new.get(CHAMPION))]
    return [f"it was rolled back on {record.when}; to take it all the same: onediff registry promote {version}"
            for record in moves[-1:] if record.action == "rollback" and record.old.get(CHAMPION) == version]


def champion_moves() -> list[TrailRecord]:
    """The valid changes of the champion, oldest first."""
    return [record for record in trail() if record.valid and record.old.get(CHAMPION) != record.new.get(CHAMPION)]
