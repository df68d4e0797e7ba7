"""The audit trail: a log of every change of the MLflow aliases of `onediff`, whose records decide the aliases.

The records are the versions of the registered model `onediff-audit`. MLflow's database numbers each record in the
transaction that creates the record, and never uses a number twice. Each change first appends a record and then sets
MLflow's aliases. A record is valid if it follows the last valid record. If two records follow the same record, the
first one is valid, and the writer of the second one gets an error. If a process dies before it has set the aliases, its
change is valid all the same, and the next change sets the aliases.

Aliases that were changed outside OneDiff are accepted and recorded as `adopted`. There is one exception: a champion
that no record has made champion was not checked against the promotion rules, so the earlier champion is set again and
recorded as `restored`.
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

OURS = (PREVIOUS, CANDIDATE, CHAMPION)  # The MLflow aliases that OneDiff uses, in the order in which they are set.
# MLflow requires a file location for each model version. The audit trail's versions have no files, so this is a dummy.
_SOURCE = "onediff-audit:/record"
_APPLIED = "applied"
_CREATION_TRIES = 5
# SQLite, PostgreSQL and MySQL report one of these texts if another process has already inserted the same row.
_INSERTED_TWICE = ("IntegrityError", "UniqueViolation", "Duplicate entry")


@dataclass(frozen=True, kw_only=True)
class Change:
    """A change of the MLflow aliases of `onediff`, before it is written to the audit trail.

    `action` is a word such as promote, and `why` is the reason. `by` is the author; None stands for the user and
    machine of this process. `figures` are the values that were compared with the promotion rules. `rules` contains
    the SHA-256 of promotion.yaml, and the git commit that contains this file or "no git".
    """

    action: str
    new: Aliases  # All aliases after the change.
    why: str
    by: str | None = None
    figures: dict[str, float] = field(default_factory=dict)
    rules: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TrailRecord(Change):
    """One record of the audit trail: a change of the MLflow aliases with its number and time.

    `old` are all aliases before the change. `follows` is the number of the last valid record that the author had read,
    or 0. `mark` is a random text by which a process recognises its own record, even if the request was sent twice.
    `applied` is True if MLflow's aliases were set after the record was written. `valid` is False if another process
    wrote its change first, so that this record changed nothing.
    """

    number: int
    when: str
    old: Aliases
    follows: int = 0
    mark: str = ""
    valid: bool = True
    applied: bool = True

    def as_dict(self) -> dict[str, Any]:
        """Return this record as a dict for JSON. `from` and `to` contain the aliases before and after the change."""
        return {"number": self.number, "when": self.when, "by": self.by, "action": self.action, "from": self.old,
                "to": self.new, "why": self.why, "figures": self.figures, "rules": self.rules, "follows": self.follows,
                "valid": self.valid, "applied": self.applied}

    def __str__(self) -> str:
        names = [name for name in reversed(OURS) if self.old.get(name) != self.new.get(name)]
        moved = ", ".join(f"{name} {self.old.get(name, '-')} -> {self.new.get(name, '-')}" for name in names)
        void = "" if self.valid else "  INVALID: another change came first"
        rules = f"  rules {self.rules['sha256'][:12]}, {self.rules['commit'][:12]}" if self.rules else ""
        return f"{self.number}  {self.when}  {self.action}  {moved}  by {self.by}: {self.why}{rules}{void}"


# This record stands for the time before the first record of the audit trail, when there were no aliases.
START = TrailRecord(number=0, when="", action="start", old={}, new={}, why="", by="")


@tracking.plain_errors()
def trail() -> list[TrailRecord]:
    """Return all records of the audit trail, oldest first, including invalid ones."""
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
    """Return the last valid record of the audit trail.

    The field `new` of this record says which aliases should be set in MLflow now.
    """
    return next((record for record in reversed(records) if record.valid), START)


@tracking.plain_errors()
def check_trail() -> list[TrailRecord]:
    """Return all records of the audit trail after checking that none is missing and that MLflow's aliases match them.

    Raises ValueError if a record is missing, if the aliases before a change are not those of the record that it names
    as the one before it, or if MLflow's aliases differ from the last valid record.
    """
    records = trail()
    missing = sorted(set(range(1, records[-1].number + 1)) - {record.number for record in records}) if records else []
    if missing:
        raise ValueError(f"the audit trail at {tracking.where()} must have no gap, but record "
                         f"{', '.join(map(str, missing))} is missing: restore the database from a backup")
    states = {0: START.new} | {record.number: record.new for record in records if record.valid}
    head = 0
    for record in records:
        if record.valid:
            head = record.number
        elif record.follows not in states or record.follows >= head or states[record.follows] != record.old:
            raise ValueError(f"the audit trail at {tracking.where()} has a fork: record {record.number} must follow an "
                             f"earlier valid record with its aliases, but follows record {record.follows} with "
                             f"{_text(record.old)}; the last valid record before the fork is {head}: restore the "
                             "database from a backup")
    if disagreement := difference(records):
        raise ValueError(disagreement)
    return records


@tracking.plain_errors()
def difference(records: list[TrailRecord] | None = None) -> str | None:
    """Return a message about how MLflow's aliases differ from the audit trail, or None if they are equal.

    The message also says how the next change of the aliases will correct this. `records` are the records of the audit
    trail; by default they are read from MLflow.
    """
    records = trail() if records is None else records
    if not records:
        return None
    head, current = last(records), _mlflow_aliases()
    if current == head.new:
        return None
    text = (f"MLflow at {tracking.where()} has {_text(current)}, but the audit trail ends with {_text(head.new)} "
            f"(record {head.number})")
    if _unfinished(records):
        return f"{text}: a change was interrupted; the next change or 'onediff registry repair' completes it"
    resolution = ("sets champion back, because that version never passed the promotion rules"
                  if _champion_without_record(current, records) else "records the new aliases as 'adopted'")
    return f"{text}: the aliases were changed outside OneDiff; the next change {resolution}"


def _champion_without_record(aliases: Mapping[str, str], records: list[TrailRecord]) -> bool:
    """Return True if MLflow has a champion that no valid record made champion; False if there are no records."""
    recorded = {record.new.get(CHAMPION) for record in records if record.valid}
    return bool(records) and aliases.get(CHAMPION, "") not in recorded | {""}


@tracking.plain_errors()
def check_champion() -> None:
    """Raise ValueError if MLflow's champion was set outside OneDiff and so never passed the promotion rules."""
    aliases = _mlflow_aliases()
    if _champion_without_record(aliases, trail()):
        version = aliases[CHAMPION]
        raise ValueError(f"MLflow at {tracking.where()}: the champion must have passed the promotion rules, but "
                         f"version {version} became champion outside OneDiff: 'onediff registry repair' restores the "
                         f"earlier champion, 'onediff registry promote {version}' checks this version")


@tracking.plain_errors()
def repair() -> TrailRecord:
    """Make MLflow's aliases and the audit trail equal again, and return the last valid record of the audit trail.

    An interrupted change is completed. A change that was made outside OneDiff is recorded, or undone if it made a
    version champion that never passed the promotion rules.
    """
    if not tracking.exists():
        store.aliases()  # Raises ValueError. Without it, `writing` would create a lock file for a missing database.
    with writing():
        return settled()


def settled(*, by: str | None = None) -> TrailRecord:
    """Make MLflow's aliases and the audit trail agree, and return the last valid record of the audit trail.

    If a process died during a change, its change is completed. If the aliases were changed outside OneDiff, that
    change is recorded or, for the champion, reversed. Call this function inside `with writing()`.
    """
    # Read the audit trail first: if a record is added before the aliases are read, our own record becomes invalid.
    records = trail()
    head, current = last(records), _mlflow_aliases()
    unfinished = _unfinished(records)
    if current == head.new or unfinished:
        if current != head.new:
            _set_aliases(head)
        for record in unfinished:
            _mark_applied(record)
        return head
    if _champion_without_record(current, records):
        why = f"champion {current[CHAMPION]} was set outside OneDiff and never passed the promotion rules"
        return apply_change(Change(action="restored", new=current | {CHAMPION: head.new.get(CHAMPION, "")}, by=by,
                                   why=why), upon=head)
    why = "changed outside OneDiff" if records else "state before the first record"
    return _append(Change(action="adopted", new=current, by=by, why=why), upon=head, tags={_APPLIED: "true"})


def apply_change(change: Change, *, upon: TrailRecord) -> TrailRecord:
    """Append a change to the audit trail, then set MLflow's aliases. Call this function inside `with writing()`.

    `upon` is the last valid record that the caller has read. Returns the new record. If another process has appended a
    valid record after `upon`, no alias changes, and a ValueError that describes that record is raised.
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
    winner = next((record for record in records if record.valid and record.follows == upon.number), last(records))
    raise ValueError(f"another change came first: record {winner.number}, {winner.action} by {winner.by} "
                     f"(the aliases are now {_text(winner.new)}); this {change.action} changed nothing (its record "
                     f"{number} is invalid): check the aliases with 'onediff registry list', then try again")


def _create_record(tags: dict[str, str], description: str) -> int:
    """Create a record of the audit trail, as a version of the MLflow model `onediff-audit`, and return its number."""
    mlflow = tracking.client()
    from mlflow.exceptions import MlflowException

    store.make_model(AUDIT, f"The audit trail: each version records one change of the aliases of '{NAME}'. "
                     "Only OneDiff may write it.")
    for tries_left in reversed(range(_CREATION_TRIES)):
        try:
            return int(mlflow.create_model_version(AUDIT, _SOURCE, tags=tags, description=description,
                                                   await_creation_for=0).version)
        except MlflowException as error:
            # MLflow gives up if other processes took each version number that it tried, so the request is repeated.
            if not tries_left or "Giving up after" not in str(error):
                raise
    raise AssertionError("the last try returns or raises")


def _set_aliases(record: TrailRecord) -> None:
    """Set MLflow's aliases to those of `record`, or to those of the newest valid record if one was added meanwhile."""
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
    """Call a method of MLflow's client, and call it again if another process inserted the same alias or tag first."""
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
                         "restore the database from a backup") from None


def _unfinished(records: list[TrailRecord]) -> list[TrailRecord]:
    return [record for record in records if record.valid and not record.applied]


def _text(aliases: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {aliases[name]}" for name in reversed(OURS) if name in aliases) or "no alias"
