"""A drop folder for pairs of one's own: each sub-folder is a batch for the source so called, in the formats of
data/README.md. A batch is read first, then claimed (renamed), its images copied, its rows appended, the source added
to DVC, and only then removed; killed between any two steps, the next run goes on from there.
"""

import csv
import difflib
import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

from onediff.data.sources import tracked
from onediff.data.sources.catalog import CATALOG
from onediff.data.sources.entries import read_csv, read_lines
from onediff.data.sources.published import Files, PublishedPair, open_files
from onediff.data.sources.readers import folder as own
from onediff.files import new_file, new_folder, sha256_of
from onediff.inputs.images import open_image
from onediff.paths import RAW

CLAIMED, DONE = ".taking.", ".done."  # prefixes inside the inbox


@dataclass(frozen=True)
class Inbox:
    """`scratch` is where archives are unpacked; `sources` are those of data.raw in params.yaml.

    A batch in which something changed less than `settle_s` ago is left for later.
    """

    folder: Path
    scratch: Path
    sources: Sequence[str]
    settle_s: float
    max_megapixels: float


@dataclass
class InboxReport:
    """`batches`: source and number of pairs of each that came in; `problems`: what was left where it is, and why;
    `waiting`: sub-folders in which something still changes.
    """

    batches: list[tuple[str, int]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    waiting: list[str] = field(default_factory=list)


def import_batches(inbox: Inbox) -> InboxReport:
    """Moves every batch that is whole into data/raw/<source>; one that is not stops no other.

    Raises FileNotFoundError if there is no inbox.
    """
    if not inbox.folder.is_dir():
        raise FileNotFoundError(f"{inbox.folder} not found: make the folder, or set inbox in runtime.yaml to another")
    report = InboxReport()
    for entry in sorted(inbox.folder.iterdir(), key=lambda path: (not path.name.startswith(CLAIMED), path.name)):
        try:
            if entry.name.startswith(DONE):
                shutil.rmtree(entry)
            elif entry.name.startswith(CLAIMED) or not entry.name.startswith("."):
                _import(entry, inbox, report)
        except (ValueError, OSError) as error:
            report.problems.append(str(error) if str(error).startswith(str(entry)) else f"{entry}: {error}")
    return report


def _import(entry: Path, inbox: Inbox, report: InboxReport) -> None:
    source = entry.name.removeprefix(CLAIMED)
    claimed = entry.with_name(f"{CLAIMED}{source}")
    if entry != claimed:  # otherwise a run was killed after it had read and claimed this one
        _check_name(entry, inbox.sources)
        listing = _listing(entry)
        # By ctime, which copying with old time stamps does not set back.
        last_change = max(path.lstat().st_ctime for path in (entry, *entry.rglob("*")))
        settled = time.time() - last_change >= inbox.settle_s
        if settled:
            _check(_batch(source, entry, inbox), inbox)
            if claimed.exists():
                raise ValueError("an earlier batch of this source is not in yet; see its own message")
            entry.rename(claimed)
            settled = _listing(claimed) == listing
            if not settled:
                claimed.rename(entry)
        if not settled:
            report.waiting.append(source)
            return
    batch = _batch(source, claimed, inbox)
    _merge(batch, inbox)
    tracked.add(RAW / source)
    done = claimed.with_name(f"{DONE}{source}.{os.getpid()}")
    claimed.rename(done)  # in one step: half a batch must never look like a whole one
    shutil.rmtree(done)
    report.batches.append((source, len(batch.pairs)))


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


def _listing(folder: Path) -> list[tuple[str, int, int]]:
    """Every file with size and time. Raises ValueError for a link, which may point anywhere."""
    paths = sorted(folder.rglob("*"))
    link = next((path for path in paths if path.is_symlink()), None)
    if link:
        raise ValueError(f"{link.relative_to(folder)} is a link; put the file itself there")
    return [(str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns)
            for path in paths if path.is_file()]


@dataclass(frozen=True)
class Batch:
    """A batch as read: its rows as written, and the same as pairs."""

    source: str
    name: str
    rows: list[dict[str, Any]]
    pairs: list[PublishedPair]
    files: Files


def _batch(source: str, folder: Path, inbox: Inbox) -> Batch:
    """Raises ValueError or FileNotFoundError: file, line, what is wrong.

    The name is <day>-<digest of its files>: a batch that was begun, or came in before, keeps the name it had.
    """
    files = open_files(folder, inbox.scratch)
    pairs = list(own.read(files))
    table = files.require(*own.TABLES)
    rows = [row for _, row in (read_csv(table) if table.suffix == ".csv" else read_lines(table))]
    contents = "".join(f"{name}\0{sha256_of(folder / name)}\n" for name, _, _ in _listing(folder))
    digest = sha256(contents.encode()).hexdigest()[:12]
    begun = sorted((RAW / source).glob(f"????-??-??-{digest}"))
    name = begun[0].name if begun else f"{datetime.now(UTC):%Y-%m-%d}-{digest}"
    return Batch(source, name, rows, pairs, files)


def _check(batch: Batch, inbox: Inbox) -> None:
    """Raises ValueError for an image that is missing or broken, and for an id or a batch that the source has already.
    """
    target, dvc_file = RAW / batch.source, RAW / f"{batch.source}.dvc"
    if not target.is_dir() and dvc_file.exists():
        raise ValueError(f"{target} is not here, and {dvc_file} says that there is one: 'dvc pull {dvc_file}' first")
    known: set[str] = set()
    if target.is_dir():
        files = open_files(target, inbox.scratch)
        known = {pair.official_id for pair in own.read(files)} if any(map(files.named, own.TABLES)) else known
        if _holds(_table(files, target), batch):
            raise ValueError(f"these very files came in before, as {target / batch.name}; remove the folder")
    for number, (row, pair) in enumerate(zip(batch.rows, batch.pairs, strict=True), 1):
        for name, path in zip(pair.names, pair.locate(batch.files), strict=True):
            if path is None:
                raise ValueError(f"pair {number}: {name} is not in the folder; put it there")
            try:
                open_image(path, max_megapixels=inbox.max_megapixels)
            except ValueError as error:
                raise ValueError(f"pair {number}: {error}") from None
        if row.get("pair_id") and pair.official_id in known:
            raise ValueError(f"pair {number}: pair_id '{pair.official_id}' is in the source already; give it another, "
                             "or leave the column out")


# --- into the source --------------------------------------------------------------------------------------------------


def _table(files: Files, target: Path) -> Path:
    return files.named(*own.TABLES) or target / "pairs.jsonl"


def _holds(table: Path, batch: Batch) -> bool:
    return table.exists() and f"{batch.name}/" in table.read_text(encoding="utf-8-sig")


def _merge(batch: Batch, inbox: Inbox) -> None:
    """Images, then rows, each in one step; what a killed run did already stays as it is."""
    target = RAW / batch.source
    target.mkdir(parents=True, exist_ok=True)
    for left in target.glob("*.part"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    table = _table(open_files(target, inbox.scratch), target)
    if _holds(table, batch):
        return
    # Called by content, so that no image of one batch is taken for that of another.
    names = {path: f"{sha256_of(path)[:32]}{path.suffix.lower()}"
             for pair in batch.pairs for path in pair.locate(batch.files) if path}
    if not (target / batch.name).exists():
        with new_folder(target / batch.name) as images:
            for path, name in names.items():
                shutil.copyfile(path, images / name)
    rows = []
    for number, (row, pair) in enumerate(zip(batch.rows, batch.pairs, strict=True), 1):
        before, after = (names[path] for path in pair.locate(batch.files) if path)
        # As the folder's reader reads it. Without a group of its own the same two images always come into one split.
        rows.append({"before": f"{batch.name}/{before}", "after": f"{batch.name}/{after}",
                     "references": pair.references,
                     "pair_id": pair.official_id if row.get("pair_id") else f"{batch.name}-{number:06d}",
                     "group": pair.group if row.get("group") else f"{Path(before).stem}|{Path(after).stem}",
                     "split": pair.split if row.get("split") else "" if pair.references else "train",
                     "change_type": pair.change_type, "instruction": pair.instruction})
    with new_file(table) as path:  # all rows or none
        _write_table(path, table, rows)


def _write_table(path: Path, table: Path, rows: list[dict[str, Any]]) -> None:
    """Writes the rows of the table, if there is one, and the new rows in its format to the path."""
    if table.suffix == ".jsonl":
        old = table.read_text(encoding="utf-8-sig") if table.exists() else ""
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_text("\n".join([*filter(None, [old.rstrip("\n")]), *lines, ""]), encoding="utf-8")
        return
    every: list[dict[str, str]] = [row for _, row in read_csv(table)]
    for row in rows:  # references in columns of their own, since one may hold the "|" that separates them in one cell
        texts = {f"reference_{number}": text for number, text in enumerate(row.pop("references"), 1)}
        every.append(row | texts)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in every for name in row)), restval="")
        writer.writeheader()
        writer.writerows(every)
