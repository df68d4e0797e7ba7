"""Imports new pairs from the inbox, a folder where users drop batches of their own pairs.

Each sub-folder of the inbox is a batch for the source of the same name, in the formats of data/README.md. The import
first reads and checks a batch, then claims the batch by renaming its folder, copies the images, appends the rows to the
source's table, runs `dvc add` and finally removes the batch. If the process is killed between two steps, the next run
continues at the interrupted step.
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
from onediff.data.sources.published import Files, PublishedPair, open_files
from onediff.data.sources.readers import folder as own
from onediff.encoding import read_text
from onediff.files import new_file, new_folder, sha256_of
from onediff.inputs.images import open_image
from onediff.paths import RAW
from onediff.text_files import read_table

CLAIMED, DONE = ".taking.", ".done."  # folder name prefixes of a batch whose import has begun, and of an imported batch


@dataclass(frozen=True)
class Inbox:
    """The settings of an inbox, the folder into which users put batches of new pairs.

    `scratch` is the folder for unpacked archives. `sources` lists the sources that accept batches (data.raw in
    params.yaml). A batch in which a file changed less than `settle_s` seconds ago is left for a later run, because a
    user may still be copying files.
    """

    folder: Path
    scratch: Path
    sources: Sequence[str]
    settle_s: float
    max_megapixels: float


@dataclass
class InboxReport:
    """The result of an import from the inbox.

    `batches` holds (source, number of pairs) for each imported batch. `problems` holds one error message for each batch
    that could not be imported and stays in the inbox. `waiting` lists the batches, by source, that stay in the inbox
    because their files changed only recently.
    """

    batches: list[tuple[str, int]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    waiting: list[str] = field(default_factory=list)


def import_batches(inbox: Inbox) -> InboxReport:
    """Import every valid batch of the inbox into data/raw/<source>, where <source> is the name of the batch folder.

    A batch with an error does not stop the other batches; the returned report contains the error. Raises
    FileNotFoundError if the inbox does not exist.
    """
    if not inbox.folder.is_dir():
        raise FileNotFoundError(f"{inbox.folder} does not exist: create this folder, or set inbox in runtime.yaml to "
                                "an existing folder")
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
    """Import the batch folder `entry` and add the result to `report`.

    The batch is new, or an interrupted run has already claimed it by renaming its folder.
    """
    source = entry.name.removeprefix(CLAIMED)
    claimed = entry.with_name(f"{CLAIMED}{source}")
    if entry != claimed:  # A claimed batch was already checked by an earlier run that did not finish the import.
        _check_name(entry, inbox.sources)
        listing = _listing(entry)
        # We use ctime, because a copied file gets a new ctime even if the copy keeps the old modification time.
        last_change = max(path.lstat().st_ctime for path in (entry, *entry.rglob("*")))
        settled = time.time() - last_change >= inbox.settle_s
        if settled:
            _check(_batch(source, entry, inbox), inbox)
            if claimed.exists():
                raise ValueError("an earlier batch of this source has not been imported yet; fix the error that is "
                                 "reported for the earlier batch first")
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
    # Rename the batch folder before removing it, because a half-removed batch must not be imported again.
    claimed.rename(done)
    shutil.rmtree(done)
    report.batches.append((source, len(batch.pairs)))


def _check_name(entry: Path, sources: Sequence[str]) -> None:
    """Raise ValueError unless `entry` is a folder whose name is one of `sources` and not a published data set."""
    if not entry.is_dir() or entry.is_symlink():
        raise ValueError("not a folder: put each batch into a sub-folder of the inbox that has the name of its source")
    if entry.name in CATALOG:
        raise ValueError("a published data set has this name, and no pairs can be added to a published data set: "
                         "choose another folder name")
    if entry.name not in sources:
        near = difflib.get_close_matches(entry.name, sources, 1)
        raise ValueError(f"the folder must have the name of a source in params.yaml: data.raw, which lists "
                         f"{', '.join(sources) or 'none'}; "
                         + (f"did you mean '{near[0]}'?" if near else "rename the folder, or add the source to "
                            "data.raw"))


def _listing(folder: Path) -> list[tuple[str, int, int]]:
    """Return (relative path, size, modification time) of every file in the folder.

    Raises ValueError if the folder contains a symbolic link, because a link may point to any file of the machine.
    """
    paths = sorted(folder.rglob("*"))
    link = next((path for path in paths if path.is_symlink()), None)
    if link:
        raise ValueError(f"{link.relative_to(folder)} is a symbolic link; replace the link by the file itself")
    return [(str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns)
            for path in paths if path.is_file()]


@dataclass(frozen=True)
class Batch:
    """A batch of new pairs from the inbox: each pair as it is in the table, and as the reader gives it."""

    source: str
    name: str
    pairs: list[tuple[own.OwnPair, PublishedPair]]
    files: Files


def _batch(source: str, folder: Path, inbox: Inbox) -> Batch:
    """Read the batch in `folder` and name the batch <date>-<digest of its files>.

    If an earlier run has imported the same files, completely or in part, the batch keeps the earlier name. Raises
    ValueError or FileNotFoundError, which names the file and the line, if the batch is not valid.
    """
    files = open_files(folder, inbox.scratch)
    pairs = list(own.read_own(files))
    contents = "".join(f"{name}\0{sha256_of(folder / name)}\n" for name, _, _ in _listing(folder))
    digest = sha256(contents.encode()).hexdigest()[:12]
    begun = sorted((RAW / source).glob(f"????-??-??-{digest}"))
    name = begun[0].name if begun else f"{datetime.now(UTC):%Y-%m-%d}-{digest}"
    return Batch(source, name, pairs, files)


def _check(batch: Batch, inbox: Inbox) -> None:
    """Raise ValueError if the batch must not be imported.

    This is the case if an image is missing or broken, or if the source already contains the batch or one of its
    pair_ids.
    """
    target, dvc_file = RAW / batch.source, RAW / f"{batch.source}.dvc"
    if not target.is_dir() and dvc_file.exists():
        raise ValueError(f"{target} does not exist although {dvc_file} does: run 'dvc pull {dvc_file}' first")
    known: set[str] = set()
    if target.is_dir():
        files = open_files(target, inbox.scratch)
        known = {pair.official_id for pair in own.read(files)} if any(map(files.named, own.TABLES)) else known
        if _holds(_table(files, target), batch):
            raise ValueError(f"exactly these files were imported before, as {target / batch.name}; remove this batch "
                             "from the inbox")
    same: dict[tuple[str, ...], int] = {}
    for number, (row, pair) in enumerate(batch.pairs, 1):
        for name, path in zip(pair.names, pair.locate(batch.files), strict=True):
            if path is None:
                raise ValueError(f"pair {number}: the image {name} is not in the folder of the batch; add the image")
            try:
                open_image(path, max_megapixels=inbox.max_megapixels)
            except ValueError as error:
                raise ValueError(f"pair {number}: {error}") from None
        if row.pair_id and row.pair_id in known:
            raise ValueError(f"pair {number}: pair_id '{row.pair_id}' already exists in the source; choose "
                             "another pair_id, or remove the column pair_id")
        first = same.setdefault((*_images(batch, pair).values(), pair.instruction), number)
        if first != number:
            raise ValueError(f"pair {number}: the images have the content of those of pair {first}; write one pair "
                             "with the references of both")


def _table(files: Files, target: Path) -> Path:
    """Return the path of the source's table of pairs, or the path for a new table if the source has none yet."""
    return files.named(*own.TABLES) or target / "pairs.jsonl"


def _holds(table: Path, batch: Batch) -> bool:
    """Return whether `table`, the source's table of pairs, already contains the rows of the batch."""
    return table.exists() and f"{batch.name}/" in read_text(table)


def _merge(batch: Batch, inbox: Inbox) -> None:
    """Copy the images of the batch into the source's folder, then append the rows to the source's table of pairs.

    Each of these two steps is atomic. A step that an interrupted run completed is not repeated.
    """
    target = RAW / batch.source
    target.mkdir(parents=True, exist_ok=True)
    for partial in target.glob("*.part"):
        shutil.rmtree(partial) if partial.is_dir() else partial.unlink()
    table = _table(open_files(target, inbox.scratch), target)
    if _holds(table, batch):
        return
    names = {path: name for _, pair in batch.pairs for path, name in _images(batch, pair).items()}
    if not (target / batch.name).exists():
        with new_folder(target / batch.name) as images:
            for path, name in names.items():
                shutil.copyfile(path, images / name)
    rows = []
    for number, (row, pair) in enumerate(batch.pairs, 1):
        before, after = (names[path] for path in pair.locate(batch.files) if path)
        # Each row has the columns that the reader of pairs.jsonl expects.
        # Without a group in the row, the two image digests form the group, so equal image pairs get one split.
        rows.append({"before": f"{batch.name}/{before}", "after": f"{batch.name}/{after}",
                     "references": pair.references,
                     "pair_id": row.pair_id or f"{batch.name}-{number:06d}",
                     "group": row.group or f"{Path(before).stem}|{Path(after).stem}",
                     "split": row.split or ("" if pair.references else "train"),
                     "change_type": pair.change_type, "instruction": pair.instruction})
    with new_file(table) as path:  # The old table is replaced only after all rows have been written.
        _write_table(path, table, rows)


def _images(batch: Batch, pair: PublishedPair) -> dict[Path, str]:
    """Return {path: new name} for the images of a pair that exist.

    The name is the digest of the content, so that equal file names in two batches do not conflict.
    """
    return {path: f"{sha256_of(path)[:32]}{path.suffix.lower()}" for path in pair.locate(batch.files) if path}


def _write_table(path: Path, table: Path, rows: list[dict[str, Any]]) -> None:
    """Write the rows of the old `table`, if there is one, and then the new rows to `path`, in the format of `table`."""
    if table.suffix == ".jsonl":
        old = read_text(table) if table.exists() else ""
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_text("\n".join([*filter(None, [old.rstrip("\n")]), *lines, ""]), encoding="utf-8")
        return
    every: list[dict[str, str]] = [row for _, row in read_table(table)]
    for row in rows:
        # Each reference gets its own column, because a reference may contain "|", the separator inside one cell.
        texts = {f"reference_{number}": text for number, text in enumerate(row.pop("references"), 1)}
        every.append(row | texts)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in every for name in row)), restval="")
        writer.writeheader()
        writer.writerows(every)
