"""What a source asks of the writer: a caption for each pair (stage write), an edit for each image (stage instruct)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow.parquet as pq

from onediff.config import Config, Writer
from onediff.data.record import SCHEMA, SPLITS, Record, Split, read_records, shards
from onediff.data.writer.request import Request, differences_from_captions, differences_from_images, edit_of_caption
from onediff.paths import PAIRS

Stage = Literal["write", "instruct"]
_LIGHT = [name for name in SCHEMA.names if name not in ("before", "after")]


@dataclass(frozen=True)
class Unfit:
    """What cannot be asked about, and why."""

    name: str
    reason: str


def writer_of(source: str, config: Config, stage: Stage) -> Writer:
    """Raises ValueError if params.yaml has no work of that kind for the source."""
    key, names = ("written", config.data.written) if stage == "write" else ("diffused", config.data.diffused)
    if source not in names:
        raise ValueError(f"params.yaml: data.{key}: does not name '{source}'; known are {', '.join(names) or 'none'}")
    if config.data.writer is None:
        raise ValueError("params.yaml: data.writer: is null; see presets/paper.yaml")
    return config.data.writer


def jobs(source: str, config: Config, stage: Stage) -> Iterator[Request | Unfit]:
    """One for each pair or image, in order. Raises ValueError if none of them can be asked about."""
    writer = writer_of(source, config, stage)
    made: Iterator[Request | Unfit] = _edits(source, writer)
    if stage == "write":
        made = _captions(source, writer)
    unfit, any_fit = None, False
    for job in made:
        any_fit = any_fit or isinstance(job, Request)
        unfit = unfit or (job if isinstance(job, Unfit) else None)
        yield job
    if unfit and not any_fit:
        raise ValueError(f"{source}: the writer can be asked about nothing; {unfit.name}: {unfit.reason}")


def is_captioned(record: Record) -> bool:
    """Whether people wrote its references already: the writer is not asked about it. Published edits are requests."""
    return bool(record.references) and "edit" not in record.provenance


def caption_job(record: Record, writer: Writer) -> Request | Unfit:
    if writer.mode == "vision":
        if not (record.before and record.after):
            return Unfit(record.pair_id, f"missing: {', '.join(record.provenance.get('missing', ['an image']))}")
        return differences_from_images(record.pair_id, writer, before=record.before, after=record.after)
    captions = record.provenance.get("captions") or []
    if len(captions) != 2 or not all(isinstance(caption, str) and caption.strip() for caption in captions):
        return Unfit(record.pair_id, "mode text needs a caption of each image, and the source has none; "
                                     "set data.writer.mode to vision")
    return differences_from_captions(record.pair_id, writer, before=captions[0], after=captions[1],
                                     edit=record.provenance.get("edit") or "")


def _captions(source: str, writer: Writer) -> Iterator[Request | Unfit]:
    folder = PAIRS / source
    records = read_records(folder) if writer.mode == "vision" else _without_images(folder)
    return (caption_job(record, writer) for record in records if not is_captioned(record))


def _without_images(folder: Path) -> Iterator[Record]:
    for path in shards(folder):
        for batch in pq.ParquetFile(path).iter_batches(columns=_LIGHT):
            for row in batch.to_pylist():
                yield Record(**row | {"before": b"", "after": b"", "provenance": json.loads(row["provenance"])})


def _edits(source: str, writer: Writer) -> Iterator[Request]:
    from onediff.data.sources.collection import list_collection

    for image in list_collection(Path("data/raw") / source):
        yield edit_of_caption(image.name, writer, caption=image.caption)


def splits_of(folder: Path) -> list[Split]:
    """The splits that the folder has shards of, in their order."""
    return [split for split in SPLITS if any(folder.glob(f"{split}-*.parquet"))]
