"""The trail: every change of the aliases is a numbered record, and the records decide what the aliases are.

The records are the versions of the registered model `onediff-audit`: MLflow's database gives each of them a number in
the same transaction, and never gives a number twice. A change first appends a record, then sets MLflow's aliases. A
record is valid if it follows the last valid one; of two records that follow the same one, the first is valid, and the
writer of the other gets an error. If a process dies before it has set the aliases, its change still counts, and the
next change sets them. Aliases that were changed outside OneDiff become a record `adopted`. But a champion that no
record ever made champion is set back, by a record `restored`: only the gate makes a champion.
"""

import json
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from onediff import tracking
from onediff.registry import store
from onediff.registry.store import (
    AUDIT,
    CANDIDATE,
    CHAMPION,
    NAME,
    PREVIOUS,
    Aliases,
    ModelVersion,
    user_and_machine,
    writing,
)

OURS = (PREVIOUS, CANDIDATE, CHAMPION)  # in the order in which they are set
_SOURCE = "onediff-audit:/record"  # MLflow requires a location of files; a record has no files
_APPLIED = "applied"
_CREATION_TRIES = 5
_INSERTED_TWICE = ("IntegrityError", "UniqueViolation", "Duplicate entry")  # SQLite, PostgreSQL, MySQL


@dataclass(frozen=True, kw_only=True)
class Change:
    """A change of the aliases. `by`: the writer; None for the user and machine of this process.

    `rules`: for a promotion, the SHA-256 of promotion.yaml and the commit that contains it, or "no git".
    """

    action: str
    new: Aliases  # all aliases after the change
    why: str
    by: str | None = None
    figures: dict[str, float] = field(default_factory=dict)
    rules: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TrailRecord(Change):
    """A change as it stands in the trail. `old`: all aliases before it; `follows`: the number of the record before it,
    0 for none.

    `mark`: a random text by which a writer recognises its own record, also if the request was sent twice. `applied`:
    MLflow's aliases were set. `valid` False: another change came first, and this one changed nothing.
    """

    number: int
    when: str
    old: Aliases
    follows: int = 0
    mark: str = ""
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


START = TrailRecord(number=0, when="", action="start", old={}, new={}, why="", by="")  # before the first record


@tracking.plain_errors()
def trail() -> list[TrailRecord]:
    """All records, oldest first, including void ones."""
    records: list[TrailRecord] = []
    head = START
    for item in store.versions_of(AUDIT):
        record = _record(item)
        if record.follows == head.number and record.old == head.new:
            head = record
        else:
            record = replace(record, valid=False)
        records.append(record)
    return records


def last(records: list[TrailRecord]) -> TrailRecord:
    """The last valid record; its `new` is what the aliases must be."""
    return next((record for record in reversed(records) if record.valid), START)


@tracking.plain_errors()
def check_trail() -> list[TrailRecord]:
    """The trail. Raises ValueError if it has a gap or a fork, or if MLflow's aliases differ from it."""
    records = trail()
    missing = sorted(set(range(1, records[-1].number + 1)) - {record.number for record in records}) if records else []
    if missing:
        raise ValueError(f"the trail at {tracking.where()} has a gap: record {', '.join(map(str, missing))} is missing")
    states = {0: START.new} | {record.number: record.new for record in records if record.valid}
    head = 0
    for record in records:
        if record.valid:
            head = record.number
        elif record.follows not in states or record.follows >= head or states[record.follows] != record.old:
            raise ValueError(f"the trail at {tracking.where()} has a fork: record {record.number} says it was made "
                             f"upon record {record.follows} and {_text(record.old)}, which is no state it could have "
                             f"seen; record {head} was the last")
    if unlike := difference(records):
        raise ValueError(unlike)
    return records


@tracking.plain_errors()
def difference(records: list[TrailRecord] | None = None) -> str | None:
    """How MLflow's aliases differ from the trail and what the next change does about it, or None."""
    records = trail() if records is None else records
    if not records:
        return None
    head, current = last(records), _mlflow_aliases()
    if current == head.new:
        return None
    text = (f"MLflow at {tracking.where()} has {_text(current)}, but the trail ends with {_text(head.new)} (record "
            f"{head.number})")
    if _unfinished(records):
        return f"{text}: a change was cut off; the next one finishes it, and so does 'onediff registry repair'"
    then = ("sets champion back: that version never met the gate" if _champion_without_record(current, records)
            else "records that as 'adopted'")
    return f"{text}: somebody changed them outside OneDiff; the next change {then}"


def _champion_without_record(aliases: Mapping[str, str], records: list[TrailRecord]) -> bool:
    """Whether the champion is a version that no valid record made champion. False for an empty trail."""
    recorded = {record.new.get(CHAMPION) for record in records if record.valid}
    return bool(records) and aliases.get(CHAMPION, "") not in recorded | {""}


@tracking.plain_errors()
def check_champion() -> None:
    """Raises ValueError if MLflow's champion is a version that never met the gate."""
    aliases = _mlflow_aliases()
    if _champion_without_record(aliases, trail()):
        version = aliases[CHAMPION]
        raise ValueError(f"MLflow at {tracking.where()} has version {version} as champion, which was set outside "
                         "OneDiff and never met the gate: 'onediff registry repair' sets champion back, 'onediff "
                         f"registry promote {version}' asks the gate")


@tracking.plain_errors()
def repair() -> TrailRecord:
    """Makes MLflow's aliases and the trail agree, as every change does first. Returns the last record."""
    if not tracking.exists():
        store.aliases()  # This raises ValueError, because `writing` would create a lock file beside a missing database.
    with writing():
        return settled()


def settled(*, by: str | None = None) -> TrailRecord:
    """Finishes a change that was cut off, or records one that was made outside OneDiff, and returns the last record.
    Call it inside `writing()`.
    """
    records = trail()  # before the aliases: a record that comes in between makes an adoption void
    head, current = last(records), _mlflow_aliases()
    unfinished = _unfinished(records)
    if current == head.new or unfinished:
        if current != head.new:
            _set_aliases(head)
        for record in unfinished:
            _mark_applied(record)
        return head
    if _champion_without_record(current, records):
        why = f"champion {current[CHAMPION]} was set outside OneDiff and never met the gate"
        return apply_change(Change(action="restored", new=current | {CHAMPION: head.new.get(CHAMPION, "")}, by=by,
                                   why=why), upon=head)
    why = "found changed outside OneDiff" if records else "as it was before there was a trail"
    return _append(Change(action="adopted", new=current, by=by, why=why), upon=head, tags={_APPLIED: "true"})


def apply_change(change: Change, *, upon: TrailRecord) -> TrailRecord:
    """Appends the change to the trail, then sets MLflow's aliases. Call it inside `writing()`.

    `upon`: the last record that the caller saw. Raises ValueError, naming the record that won, if another change came
    first; then nothing is changed.
    """
    without_empty = {alias: version for alias, version in change.new.items() if version}
    record = _append(replace(change, new=without_empty), upon=upon)
    _set_aliases(record)
    _mark_applied(record)
    return record


def _append(change: Change, *, upon: TrailRecord, tags: Mapping[str, str] | None = None) -> TrailRecord:
    note = {"action": change.action, "by": change.by or user_and_machine(), "why": change.why,
            "follows": str(upon.number), "mark": uuid.uuid4().hex, **(tags or {}),
            **{key: json.dumps(value, sort_keys=True) for key, value in (
                ("figures", change.figures), ("rules", change.rules), ("from", upon.new), ("to", change.new))}}
    number = _create_record(note, f"{change.action}: {_text(upon.new)} -> {_text(change.new)}: {change.why}")
    records = trail()
    ours = next((record for record in records if record.valid and record.mark == note["mark"]), None)
    if ours:
        return ours
    won = next((record for record in records if record.valid and record.follows == upon.number), last(records))
    raise ValueError(f"another change came first: record {won.number}, {won.action} by {won.by} ({_text(won.new)}); "
                     f"this {change.action} changed nothing (record {number} is void): look, then try again")


def _create_record(tags: dict[str, str], description: str) -> int:
    """Creates a version of the audit model. Returns its number."""
    mlflow = tracking.client()
    from mlflow.exceptions import MlflowException

    store.make_model(AUDIT, f"Every change of the aliases of '{NAME}', by number. OneDiff writes it, nobody else.")
    for tries_left in reversed(range(_CREATION_TRIES)):
        try:
            return int(mlflow.create_model_version(AUDIT, _SOURCE, tags=tags, description=description,
                                                   await_creation_for=0).version)
        except MlflowException as error:
            if not tries_left or "Giving up after" not in str(error):  # others took the numbers that MLflow tried
                raise
    raise AssertionError("the last try returns or raises")


def _set_aliases(record: TrailRecord) -> None:
    """Sets MLflow's aliases to those of the record, and then to those of a newer record if there is one by then."""
    mlflow = tracking.client()
    while True:
        current = _mlflow_aliases()
        for alias in OURS:
            if alias in record.new and current.get(alias) != record.new[alias]:
                _insert(mlflow.set_registered_model_alias, NAME, alias, record.new[alias])
            elif alias not in record.new and alias in current:
                mlflow.delete_registered_model_alias(NAME, alias)
        newest = last(trail())
        if newest.number == record.number:
            return
        record = newest


def _mark_applied(record: TrailRecord) -> None:
    _insert(store.set_tags, AUDIT, str(record.number), {_APPLIED: "true"})


def _insert(call: Callable[..., object], *arguments: Any) -> None:
    """Repeats a call that failed because another process inserted the same alias or tag at the same time."""
    from mlflow.exceptions import MlflowException

    try:
        call(*arguments)
    except MlflowException as error:
        if not any(word in str(error) for word in _INSERTED_TWICE):
            raise
        call(*arguments)


def _mlflow_aliases() -> Aliases:
    return {alias: version for alias, version in store.aliases().items() if alias in OURS}


def _record(item: ModelVersion) -> TrailRecord:
    tags = item.tags
    try:
        return TrailRecord(number=int(item.version), when=store.iso_time(item.creation_timestamp), by=tags["by"],
                      action=tags["action"], old=json.loads(tags["from"]), new=json.loads(tags["to"]), why=tags["why"],
                      figures=json.loads(tags["figures"]), follows=int(tags["follows"]), mark=tags["mark"],
                      rules=json.loads(tags.get("rules", "{}")), applied=_APPLIED in tags)
    except (KeyError, ValueError) as error:
        raise ValueError(f"record {item.version} of '{AUDIT}' at {tracking.where()} cannot be read ({error!r}): "
                         "restore the database") from None


def _unfinished(records: list[TrailRecord]) -> list[TrailRecord]:
    return [record for record in records if record.valid and not record.applied]


def _text(aliases: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {aliases[name]}" for name in reversed(OURS) if name in aliases) or "no alias"
