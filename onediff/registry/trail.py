"""The trail: every change of the aliases as a numbered record, and the records decide what the aliases are.

The records are the versions of the registered model `onediff-audit`: MLflow's database gives each its number in the
same step, and never the same one twice. A change is first appended, then MLflow's aliases follow it. A record counts if
it was made upon the last one that counts; of two made upon the same record the first does, and the writer of the other
is told. A process that dies before the aliases followed has still made its change: the next one brings them after.
Aliases that were changed outside OneDiff become a record `adopted`. But a champion that no record ever made one is set
back, by a record `restored`: only the gate makes a champion.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from onediff import tracking
from onediff.registry import store
from onediff.registry.store import AUDIT, CANDIDATE, CHAMPION, NAME, PREVIOUS, Aliases
from onediff.registry.writer_lock import whoami, writing

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

OURS = (PREVIOUS, CANDIDATE, CHAMPION)  # in the order in which they are set
_SOURCE = "onediff-audit:/record"  # MLflow wants a place of the files; a record has none
_APPLIED = "applied"
_CREATION_TRIES = 5
_AT_ONCE = ("IntegrityError", "UniqueViolation", "Duplicate entry")  # SQLite, PostgreSQL, MySQL


@dataclass(frozen=True)
class Change:
    """One record. `old` and `new`: all aliases before and after it; `follows`: the number it was made upon, 0 for none.
    `rules`: of a promotion, the SHA-256 of promotion.yaml and the commit that has it, or "no git".

    `mark`: its writer's own, by which a request that was sent twice is known. `valid` False: another change came first,
    and this one changed nothing. `applied`: MLflow's aliases followed.
    """

    number: int
    when: str
    by: str
    action: str
    old: Aliases
    new: Aliases
    why: str
    figures: dict[str, float] = field(default_factory=dict)
    follows: int = 0
    mark: str = ""
    rules: dict[str, str] = field(default_factory=dict)
    valid: bool = True
    applied: bool = True

    def as_dict(self) -> dict[str, Any]:
        """For JSON, with `from` and `to`."""
        return {"number": self.number, "when": self.when, "by": self.by, "action": self.action, "from": self.old,
                "to": self.new, "why": self.why, "figures": self.figures, "rules": self.rules, "follows": self.follows,
                "valid": self.valid, "applied": self.applied}

    def __str__(self) -> str:
        names = [name for name in reversed(OURS) if self.old.get(name) != self.new.get(name)]
        moved = ", ".join(f"{name} {self.old.get(name, '-')} -> {self.new.get(name, '-')}" for name in names)
        void = "" if self.valid else "  VOID: another change came first"
        rules = f"  rules {self.rules['sha256'][:12]}, {self.rules['commit'][:12]}" if self.rules else ""
        return f"{self.number}  {self.when}  {self.action}  {moved}  by {self.by}: {self.why}{rules}{void}"


START = Change(0, "", "", "start", {}, {}, "")  # before the first record


@store.plain_errors()
def trail() -> list[Change]:
    """All records, oldest first, with those that lost against another."""
    return _read()


def last(changes: list[Change]) -> Change:
    """The last record that counts; its `new` is what the aliases are."""
    return next((change for change in reversed(changes) if change.valid), START)


@store.plain_errors()
def check_trail() -> list[Change]:
    """The trail, if it has no gap and no fork and MLflow's aliases are as it says. Raises ValueError if not."""
    changes = _read()
    missing = sorted(set(range(1, changes[-1].number + 1)) - {change.number for change in changes}) if changes else []
    if missing:
        raise ValueError(f"the trail at {tracking.where()} has a gap: record {', '.join(map(str, missing))} is missing")
    states = {0: START.new} | {change.number: change.new for change in changes if change.valid}
    head = 0
    for change in changes:
        if change.valid:
            head = change.number
        elif change.follows not in states or change.follows >= head or states[change.follows] != change.old:
            raise ValueError(f"the trail at {tracking.where()} has a fork: record {change.number} says it was made "
                             f"upon record {change.follows} and {_said(change.old)}, which is no state it could have "
                             f"seen; record {head} was the last")
    unlike = _difference(changes)
    if unlike:
        raise ValueError(unlike)
    return changes


@store.plain_errors()
def difference() -> str | None:
    """How MLflow's aliases differ from the trail and what the next change does about it, or None."""
    return _difference(_read())


def _difference(changes: list[Change]) -> str | None:
    if not changes:
        return None
    state, found = last(changes), _found()
    if found == state.new:
        return None
    told = (f"MLflow at {tracking.where()} has {_said(found)}, but the trail ends with {_said(state.new)} (record "
            f"{state.number})")
    if _unfinished(changes):
        return f"{told}: a change was cut off; the next one finishes it, and so does 'onediff registry repair'"
    then = "sets champion back: that version never met the gate" if _past_the_gate(found, changes) else (
        "records that as 'adopted'")
    return f"{told}: somebody changed them outside OneDiff; the next change {then}"


def _past_the_gate(aliases: Mapping[str, str], changes: list[Change]) -> bool:
    """Whether the champion is a version that no valid record made champion. False while there is no record."""
    gated = {one.new.get(CHAMPION) for one in changes if one.valid}
    return bool(changes) and aliases.get(CHAMPION, "") not in gated | {""}


@store.plain_errors()
def check_champion() -> None:
    """Raises ValueError if MLflow's champion is a version that never met the gate."""
    aliases = _found()
    if _past_the_gate(aliases, _read()):
        version = aliases[CHAMPION]
        raise ValueError(f"MLflow at {tracking.where()} has version {version} as champion, which was set outside "
                         "OneDiff and never met the gate: 'onediff registry repair' sets champion back, 'onediff "
                         f"registry promote {version}' asks the gate")


@store.plain_errors()
def repair(*, by: str | None = None) -> Change:
    """Makes MLflow's aliases and the trail agree, as every change does first; gives the last record."""
    with writing():
        return settled(by=by)


def settled(*, by: str | None = None) -> Change:
    """The last record, after a change that was cut off is finished, or one made outside is adopted. While writing."""
    changes = _read()  # before the aliases: a record that comes between makes an adoption void
    head, found = last(changes), _found()
    unfinished = _unfinished(changes)
    if found == head.new or unfinished:
        if found != head.new:
            _follow(head)
        for record in unfinished:
            _mark(record)
        return head
    if _past_the_gate(found, changes):
        why = f"champion {found[CHAMPION]} was set outside OneDiff and never met the gate"
        return change("restored", {**found, CHAMPION: head.new.get(CHAMPION, "")}, upon=head, by=by, why=why)
    why = "found changed outside OneDiff" if changes else "as it was before there was a trail"
    return _append("adopted", found, upon=head, by=by, why=why, notes={_APPLIED: "true"})


def change(action: str, new: Mapping[str, str], *, upon: Change, by: str | None, why: str,
           figures: Mapping[str, float] | None = None, rules: Mapping[str, str] | None = None) -> Change:
    """Appends the record, then lets MLflow's aliases follow. Raises ValueError, naming the record that won, if another
    change came first; then nothing is changed. While writing.
    """
    notes = {"figures": _json(figures or {}), "rules": _json(rules or {})}
    new = {alias: version for alias, version in new.items() if version}
    made = _append(action, new, upon=upon, by=by, why=why, notes=notes)
    _follow(made)
    _mark(made)
    return made


def _append(action: str, new: Mapping[str, str], *, upon: Change, by: str | None, why: str,
            notes: Mapping[str, str]) -> Change:
    tags = {"action": action, "by": by or whoami(), "why": why, "figures": "{}", "from": _json(upon.new),
            "to": _json(new), "follows": str(upon.number), "mark": uuid.uuid4().hex, **notes}
    number = _created(tags, f"{action}: {_said(upon.new)} -> {_said(new)}: {why}")
    changes = _read()
    mine = next((one for one in changes if one.valid and one.mark == tags["mark"]), None)
    if mine:
        return mine
    won = next((one for one in changes if one.valid and one.follows == upon.number), last(changes))
    raise ValueError(f"another change came first: record {won.number}, {won.action} by {won.by} ({_said(won.new)}); "
                     f"this {action} changed nothing (record {number} is void): look, then try again")


def _created(tags: dict[str, str], told: str) -> int:
    """The new record's number."""
    opened = tracking.client()
    from mlflow.exceptions import MlflowException

    store.make_model(AUDIT, f"Every change of the aliases of '{NAME}', by number. OneDiff writes it, nobody else.")
    for left in reversed(range(_CREATION_TRIES)):
        try:
            made = opened.create_model_version(AUDIT, _SOURCE, tags=tags, description=told, await_creation_for=0)
            return int(made.version)
        except MlflowException as error:
            if not left or "Giving up after" not in str(error):  # others took the numbers that MLflow tried
                raise
    raise AssertionError("the last try returns or raises")


def _follow(made: Change) -> None:
    """MLflow's aliases as the record says, or as a later one does that came meanwhile."""
    while True:
        _set(made.new)
        newest = last(_read())
        if newest.number == made.number:
            return
        made = newest


def _set(new: Mapping[str, str]) -> None:
    opened, found = tracking.client(), _found()
    for alias in OURS:
        if alias in new and found.get(alias) != new[alias]:
            _twice(partial(opened.set_registered_model_alias, NAME, alias, new[alias]))
        elif alias not in new and alias in found:
            opened.delete_registered_model_alias(NAME, alias)


def _mark(made: Change) -> None:
    _twice(partial(store.tag, AUDIT, str(made.number), {_APPLIED: "true"}))


def _twice(call: Callable[[], object]) -> None:
    """MLflow fails where two insert the same alias or tag at once; the second time it is there, and is replaced."""
    from mlflow.exceptions import MlflowException

    try:
        call()
    except MlflowException as error:
        if not any(word in str(error) for word in _AT_ONCE):
            raise
        call()


def _found() -> Aliases:
    return {alias: version for alias, version in store.aliases().items() if alias in OURS}


def _read() -> list[Change]:
    changes: list[Change] = []
    head = START
    for item in store.all_of(AUDIT):
        made = _change(item)
        if made.follows == head.number and made.old == head.new:
            head = made
        else:
            made = Change(**{**vars(made), "valid": False})
        changes.append(made)
    return changes


def _change(item: ModelVersion) -> Change:
    tags = item.tags
    try:
        return Change(int(item.version), store.when(item.creation_timestamp), tags["by"], tags["action"],
                      json.loads(tags["from"]), json.loads(tags["to"]), tags["why"], json.loads(tags["figures"]),
                      int(tags["follows"]), tags["mark"], json.loads(tags.get("rules", "{}")), applied=_APPLIED in tags)
    except (KeyError, ValueError) as error:
        raise ValueError(f"record {item.version} of '{AUDIT}' at {tracking.where()} cannot be read ({error!r}): "
                         "restore the database") from None


def _unfinished(changes: list[Change]) -> list[Change]:
    return [change for change in changes if change.valid and not change.applied]


def _said(aliases: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {aliases[name]}" for name in reversed(OURS) if name in aliases) or "no alias"


def _json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, sort_keys=True)
