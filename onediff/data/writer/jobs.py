"""What a source asks of the writer: a caption for each pair (stage write), an edit for each image (stage instruct)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from onediff.config import Config, Writer
from onediff.data.record import Record, read_records, read_table, shards
from onediff.data.sources.collection import list_collection
from onediff.data.writer.request import Request, differences_from_captions, differences_from_images, edit_of_caption
from onediff.paths import PAIRS, RAW

Stage = Literal["write", "instruct"]


@dataclass(frozen=True)
class Unfit:
    """A pair that the writer cannot be asked about, and why."""

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
    if stage == "instruct":
        for image in list_collection(RAW / source):
            yield edit_of_caption(image.name, writer, caption=image.caption)
        return
    folder = PAIRS / source
    records = read_records(folder) if writer.mode == "vision" else (
        Record(**row, before=b"", after=b"") for shard in shards(folder) for row in read_table(folder, shard.name))
    unfit, any_fit = None, False
    for job in (caption_job(record, writer) for record in records if not is_captioned(record)):
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
