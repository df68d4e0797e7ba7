"""A drop folder for pairs of one's own: each sub-folder is a batch for the source so called, in the formats of
data/README.md. A batch is read first, then claimed (renamed), its images copied, its rows appended, the source added
to DVC, and only then removed; killed between any two steps, the next run goes on from there.
"""

from __future__ import annotations

import csv
import difflib
import json
import os
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

from onediff.data.sources import tracked
from onediff.data.sources.catalog import CATALOG
from onediff.data.sources.entries import read_csv, read_lines
from onediff.data.sources.file_index import Files, open_files
from onediff.data.sources.published import PublishedPair
from onediff.data.sources.readers import folder as own
from onediff.inputs.images import open_image

CLAIMED, DONE = ".taking.", ".done."  # prefixes inside the inbox


@dataclass
class Taken:
    """`batches`: source and number of pairs of each that came in; `problems`: what was left where it is, and why;
    `waiting`: sub-folders in which something still changes.
    """

    batches: list[tuple[str, int]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    waiting: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Places:
    inbox: Path
    scratch: Path  # where archives are unpacked
    raw: Path = tracked.RAW


def take(places: Places, sources: Sequence[str], *, settle_s: float, max_megapixels: float) -> Taken:
    """Every batch that is whole goes into data/raw/<source>; one that is not stops no other.

    `sources` are those of data.raw in params.yaml. Raises FileNotFoundError if there is no inbox.
    """
    if not places.inbox.is_dir():
        raise FileNotFoundError(f"{places.inbox} not found: make the folder, or set inbox in runtime.yaml to another")
    taken = Taken()
    entries = sorted(places.inbox.iterdir(), key=lambda path: (not path.name.startswith(CLAIMED), path.name))
    for entry in entries:
        try:
            if entry.name.startswith(DONE):
                shutil.rmtree(entry)
            elif entry.name.startswith(CLAIMED) or not entry.name.startswith("."):
                _take(entry, places, sources, settle_s, max_megapixels, taken)
        except (ValueError, OSError) as error:
            taken.problems.append(str(error) if str(error).startswith(str(entry)) else f"{entry}: {error}")
    return taken


def _take(entry: Path, places: Places, sources: Sequence[str], settle_s: float, max_megapixels: float,
          taken: Taken) -> None:
    source, claimed = entry.name.removeprefix(CLAIMED), entry
    if not entry.name.startswith(CLAIMED):  # otherwise a run was killed after it had read and claimed this one
        _check_name(entry, sources)
        seen = _listing(entry)
        if time.time() - _last_change(entry) < settle_s:
            taken.waiting.append(source)
            return
        _check(_batch(source, entry, places), places, _known_ids(source, places), max_megapixels)
        claimed = entry.with_name(f"{CLAIMED}{source}")
        if claimed.exists():
            raise ValueError("an earlier batch of this source is not in yet; see its own message")
        entry.rename(claimed)
        if _listing(claimed) != seen:
            claimed.rename(entry)
            taken.waiting.append(source)
            return
    batch = _batch(source, claimed, places)
    _merge(batch, places)
    tracked.add(places.raw / source)
    done = claimed.with_name(f"{DONE}{source}.{os.getpid()}")
    claimed.rename(done)  # in one step: half a batch must never look like a whole one
    shutil.rmtree(done)
    taken.batches.append((source, len(batch.pairs)))


# --- before anything moves -------------------------------------------------------------------------------------------


def _check_name(entry: Path, sources: Sequence[str]) -> None:
    if not entry.is_dir() or entry.is_symlink():
        raise ValueError("not a folder: put a batch into a sub-folder called as its source")
    if entry.name in CATALOG:
        raise ValueError("a published set, which takes no pairs of one's own: give yours a name of their own")
    if entry.name not in sources:
        near = difflib.get_close_matches(entry.name, sources, 1)
        raise ValueError(f"no source of params.yaml: data.raw, which names {', '.join(sources) or 'none'}; "
                         + (f"did you mean '{near[0]}'?" if near else "rename the folder, or add the source there"))


def _last_change(folder: Path) -> float:
    """By ctime, which copying with old time stamps does not set back."""
    return max(path.lstat().st_ctime for path in (folder, *folder.rglob("*")))


def _listing(folder: Path) -> list[tuple[str, int, int]]:
    """Every file with size and time. Raises ValueError for a link, which may point anywhere."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            raise ValueError(f"{path.relative_to(folder)} is a link; put the file itself there")
        if path.is_file():
            found.append((str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns))
    return found


@dataclass(frozen=True)
class Batch:
    """A batch as read: its rows as written, and the same as pairs."""

    source: str
    name: str
    rows: list[dict[str, Any]]
    pairs: list[PublishedPair]
    files: Files


def _batch(source: str, folder: Path, places: Places) -> Batch:
    """Raises ValueError or FileNotFoundError: file, line, what is wrong."""
    files = open_files(folder, places.scratch)
    pairs = list(own.read(files))
    read = read_csv if files.named("pairs.csv") else read_lines
    rows = [row for _, row in read(files.require(*own.TABLES))]
    return Batch(source, _name(folder, places.raw / source), rows, pairs, files)


def _check(batch: Batch, places: Places, known: set[str], max_megapixels: float) -> None:
    """Raises ValueError for an image that is missing or broken, and for an id or a batch that the source has already.
    """
    target = places.raw / batch.source
    if target.is_dir() and _holds(_table(target, places), batch):
        raise ValueError(f"these very files came in before, as {target / batch.name}; remove the folder")
    for number, (row, pair) in enumerate(zip(batch.rows, batch.pairs, strict=True), 1):
        for name, path in zip(pair.names, pair.locate(batch.files), strict=True):
            if path is None:
                raise ValueError(f"pair {number}: {name} is not in the folder; put it there")
            try:
                open_image(path, max_megapixels=max_megapixels)
            except ValueError as error:
                raise ValueError(f"pair {number}: {error}") from None
        if row.get("pair_id") and pair.official_id in known:
            raise ValueError(f"pair {number}: pair_id '{pair.official_id}' is in the source already; give it another, "
                             "or leave the column out")


def _known_ids(source: str, places: Places) -> set[str]:
    """Raises ValueError if DVC has the source and its files are not here."""
    target = places.raw / source
    tracked = target.with_name(f"{source}.dvc")
    if not target.is_dir():
        if tracked.exists():
            raise ValueError(f"{target} is not here, and {tracked} says that there is one: 'dvc pull {tracked}' first")
        return set()
    files = open_files(target, places.scratch)
    if not any(map(files.named, own.TABLES)):
        return set()
    return {pair.official_id for pair in own.read(files)}


def _name(folder: Path, target: Path) -> str:
    """<day>-<digest of its files>: a batch that was begun, or came in before, keeps the name it had."""
    total = sha256()
    for name, _, _ in _listing(folder):
        total.update(f"{name}\0{_digest(folder / name)}\n".encode())
    digest = total.hexdigest()[:12]
    begun = sorted(target.glob(f"????-??-??-{digest}"))
    return begun[0].name if begun else f"{datetime.now(UTC):%Y-%m-%d}-{digest}"


# --- into the source --------------------------------------------------------------------------------------------------


def _table(target: Path, places: Places) -> Path:
    return open_files(target, places.scratch).named(*own.TABLES) or target / "pairs.jsonl"


def _holds(table: Path, batch: Batch) -> bool:
    return table.exists() and f"{batch.name}/" in table.read_text(encoding="utf-8-sig")


def _merge(batch: Batch, places: Places) -> None:
    """Images, then rows, each in one step; what a killed run did already stays as it is."""
    target = places.raw / batch.source
    target.mkdir(parents=True, exist_ok=True)
    for left in target.glob(".*.part"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    table = _table(target, places)
    if _holds(table, batch):
        return
    # Called by content, so that no image of one batch is taken for that of another.
    names = {path: f"{_digest(path)[:32]}{path.suffix.lower()}"
             for pair in batch.pairs for path in pair.locate(batch.files) if path}
    images = target / batch.name
    if not images.exists():
        part = target / f".{batch.name}.part"
        part.mkdir()
        for path, name in names.items():
            shutil.copyfile(path, part / name)
        part.rename(images)
    placed = [[f"{batch.name}/{names[path]}" for path in pair.locate(batch.files) if path] for pair in batch.pairs]
    _append(table, [_row(number, *about) for number, about
                    in enumerate(zip(batch.rows, batch.pairs, placed, strict=True), 1)])


def _row(number: int, row: dict[str, Any], pair: PublishedPair, images: list[str]) -> dict[str, Any]:
    """As the folder's reader reads it. Without a group of its own the same two images always come into one split."""
    before, after = images
    return {"before": before, "after": after, "references": pair.references,
            "pair_id": pair.official_id if row.get("pair_id") else f"{Path(before).parts[0]}-{number:06d}",
            "group": pair.group if row.get("group") else "|".join(Path(name).stem for name in images),
            "split": pair.split if row.get("split") else "" if pair.references else "train",
            "change_type": pair.change_type, "instruction": pair.instruction}


def _digest(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()


def _append(table: Path, rows: list[dict[str, Any]]) -> None:
    """All rows or none: the table is written anew beside its place and moved there."""
    part = table.with_name(f".{table.name}.part")
    if table.suffix == ".jsonl":
        old = table.read_text(encoding="utf-8-sig") if table.exists() else ""
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        part.write_text("\n".join([*filter(None, [old.rstrip("\n")]), *lines, ""]), encoding="utf-8")
    else:
        _write_csv(part, [*(row for _, row in read_csv(table)), *map(_in_columns, rows)])
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(table)


def _in_columns(row: dict[str, Any]) -> dict[str, str]:
    """References in columns of their own, since one may hold the "|" that separates them in one cell."""
    sentences = {f"reference_{number}": text for number, text in enumerate(row["references"], 1)}
    return {key: value for key, value in row.items() if key != "references"} | sentences


def _write_csv(path: Path, rows: Iterable[dict[str, str]]) -> None:
    rows = list(rows)
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names, restval="")
        writer.writeheader()
        writer.writerows(rows)
