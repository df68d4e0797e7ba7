"""Changes of the MLflow aliases `candidate`, `champion` and `previous`: propose a version, promote it, roll back.

Every change is written to the audit trail (audit_trail.py).
"""

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from onediff import tracking
from onediff.files import key_of, sha256_of
from onediff.registry import store
from onediff.registry.artifacts import MODEL_DIGEST, SCORES_DIGEST, check_files, pair_scores, scores_of
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

REGISTER = "register a version first: 'make run', or 'dvc repro' and then 'onediff registry register'"
REFUSED = ("refused_at", "refused_because")  # MLflow tags with the time and reasons of a version's last refusal.


@tracking.plain_errors()
def propose(version: str, *, by: str | None = None) -> None:
    """Give the registered version with this number the MLflow alias `candidate`, unless it already has this alias."""
    with writing():
        head = settled(by=by)
        if head.new.get(CANDIDATE) != version:
            store.get(version)
            apply_change(Change(action="propose", new=head.new | {CANDIDATE: version}, by=by, why="registered"),
                         upon=head)


@tracking.plain_errors()
def promote(version: str | None = None, *, rules: Path = RULES, by: str | None = None, why: str | None = None,
            approved: PromotionCase | None = None) -> Verdict:
    """Make a registered version the champion if it meets the promotion rules, and return the `Verdict` in both cases.

    `version` is the number of the version, by default that of the candidate. `rules` is the file with the promotion
    rules, which apply to the scores of the `gate` split. If the rules set `approval_h`, a person must have approved
    the `case` of an earlier verdict, and `approved` is this case. If the version is already the champion, nothing
    changes. A version that a rollback replaced becomes champion again only if the caller passes its number.

    Raises ValueError if the version does not exist, if its files are missing or changed, if the approved case differs
    from the present one, or if another process changed the aliases first.
    """
    demands = load_rules(rules)
    with writing():
        head = settled(by=by)
        candidate, champion = version or version_of(CANDIDATE, head.new, REGISTER), head.new.get(CHAMPION)
        if candidate != champion:
            check_files(store.get(candidate))
        verdict = assess(version, file=rules, aliases=head.new)
        if approved and approved != verdict.case:
            raise ValueError(f"the approval was for {approved}, but the promotion would now be of {verdict.case}: no "
                             "version was promoted; start the promotion again and approve the version as it is now")
        if demands.approval_h and not approved and verdict.promoted and candidate != champion:
            raise ValueError(f"{rules}: approval_h requires that a person approves {verdict.case} as champion, but no "
                             "approval was given: run 'onediff registry promote', which asks for it")
        if not verdict.promoted:
            store.set_tags(NAME, candidate, {
                REFUSED[0]: datetime.now(UTC).isoformat(timespec="seconds"),
                REFUSED[1]: "; ".join(verdict.reasons)[:4900]})  # MLflow accepts at most 5000 characters per tag.
        elif candidate != champion:
            beats = f", better than version {champion}" if champion and demands.better_than_champion else ""
            reason = f"meets {rules.name}{beats}"
            _make_champion(verdict, head, by=by, why=f"{reason}: {why}" if why else reason)
    return verdict


def _make_champion(verdict: Verdict, head: TrailRecord, *, by: str | None, why: str) -> None:
    """Make the version of the verdict the champion, and remove its MLflow tags about an earlier refused promotion."""
    assert verdict.case, "every verdict of assess has a case"
    previous = {PREVIOUS: head.new[CHAMPION]} if head.new.get(CHAMPION) else {}
    apply_change(Change(action="promote", new={**head.new, **previous, CHAMPION: verdict.version}, by=by, why=why,
                 figures=verdict.figures, rules={"sha256": verdict.case.rules, "commit": verdict.case.commit}),
          upon=head)
    for key in REFUSED:
        if key in store.get(verdict.version).tags:
            tracking.client().delete_model_version_tag(NAME, verdict.version, key)


@tracking.plain_errors()
def rollback(*, by: str | None = None, why: str | None = None) -> str:
    """Make the version with the MLflow alias `previous` the champion again, and return the number of this version.

    The alias `previous` then moves to the champion before this version, if there was one. The promotion rules are not
    checked, because this version was champion before. Raises ValueError, and changes no alias, if no version has the
    alias `champion` or `previous`, or if the files of the previous champion are missing or changed.
    """
    with writing():
        head = settled(by=by)
        champion = version_of(CHAMPION, head.new, "so there is nothing to roll back; 'onediff registry promote' makes "
                              "a version champion")
        back = version_of(PREVIOUS, head.new, f"version {champion} is the first champion, so there is no version to "
                          "roll back to")
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
    """Return the champion's address models:/onediff/VERSION if the champion must be scored again, otherwise None.

    It must be scored again if the champion and `version` (by default the candidate) were scored on different image
    pairs, with different reference captions or by different scoring protocols, because their scores cannot be compared.
    """
    demands, aliases = load_rules(rules), store.aliases()
    candidate, champion = version or version_of(CANDIDATE, aliases, REGISTER), aliases.get(CHAMPION)
    if champion is None or champion == candidate:
        return None
    ours, theirs = (pair_scores(store.get(number)) for number in (candidate, champion))
    return f"models:/{NAME}/{champion}" if incomparable(demands, ours, theirs) else None


@tracking.plain_errors()
def assess(version: str | None = None, *, file: Path = RULES, aliases: Aliases | None = None) -> Verdict:
    """Return the `Verdict` that `promote` would return now, without changing anything.

    `version` is by default the number of the candidate, `file` has the promotion rules, and `aliases` are by default
    the present aliases in MLflow.
    """
    rules, commit = load_rules(file), commit_of_rules(file)
    aliases = store.aliases() if aliases is None else aliases
    number, champion = version or version_of(CANDIDATE, aliases, REGISTER), aliases.get(CHAMPION)
    candidate = store.get(number)
    scores, tags = scores_of(candidate, "gate"), candidate.tags
    check_metrics(rules, scores, file=file)
    figures = figures_of(rules, scores, tags)
    # Old versions have their scores in the MLflow tag scores_gate, which the digest of the score files does not cover.
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
    """Return a list with the reason why the scores of a version cannot be used for a promotion, or [] if they can.

    One reason is that an old version has no digest that connects its scores with its model. Another reason is that the
    MLflow store no longer has the scores of each image pair.
    """
    again = f"score the version again: python -m flows.evaluate models:/{NAME}/{version.version}"
    if MODEL_DIGEST not in version.tags or SCORES_DIGEST not in version.tags:
        return [f"the version must have a digest that connects its scores with its model, but has none: {again}"]
    return [] if pairs else [f"the scores of its pairs, scored/gate.json, are missing in the store: {again}"]


def _rolled_back(version: str) -> list[str]:
    """Return a list with a reason if a rollback replaced this version and nobody has promoted it again, or []."""
    moves = [record for record in champion_moves()
             if version in (record.old.get(CHAMPION), record.new.get(CHAMPION))]
    return [f"a rollback on {record.when} replaced this version; to promote it again, run 'onediff registry promote "
            f"{version}'"
            for record in moves[-1:] if record.action == "rollback" and record.old.get(CHAMPION) == version]


def champion_moves() -> list[TrailRecord]:
    """Return all valid records of the audit trail that changed the MLflow alias `champion`, oldest first."""
    return [record for record in trail() if record.valid and record.old.get(CHAMPION) != record.new.get(CHAMPION)]
