"""The requests that a source needs: a caption for each pair (stage `write`), or an edit for each image (`instruct`)."""

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
    """A pair for which no request to the writer can be made, and the reason."""

    name: str
    reason: str


def writer_of(source: str, config: Config, stage: Stage) -> Writer:
    """Return the settings of the writer; raise ValueError if params.yaml does not list the source for this stage."""
    key, names = ("written", config.data.written) if stage == "write" else ("diffused", config.data.diffused)
    if source not in names:
        cure = (f"add this source, or choose one of the listed sources: {', '.join(names)}" if names else
                "the list is empty; presets/paper.yaml has an example of a list")
        raise ValueError(f"params.yaml: data.{key}: does not list '{source}'; {cure}")
    if config.data.writer is None:
        raise ValueError("params.yaml: data.writer: must be set, got null; see presets/paper.yaml for an example")
    return config.data.writer


def jobs(source: str, config: Config, stage: Stage) -> Iterator[Request | Unfit]:
    """Yield a request to the writer for each pair or image of the source that needs a text.

    If a pair lacks what the request needs, an `Unfit` with the reason is yielded instead. Raises ValueError if this is
    true for all pairs.
    """
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
        raise ValueError(f"{source}: no pair can be sent to the writer; the first pair is {unfit.name}: "
                         f"{unfit.reason}")


def is_captioned(record: Record) -> bool:
    """Return whether the record already has captions by people, so that the writer need not be asked.

    The references of records with a published edit are edit instructions, so they do not count as captions.
    """
    return bool(record.references) and "edit" not in record.provenance


def caption_job(record: Record, writer: Writer) -> Request | Unfit:
    """Return the request for a caption of the record's pair, or an `Unfit` that says why no request can be made."""
    if writer.mode == "vision":
        if not (record.before and record.after):
            return Unfit(record.pair_id, f"missing: {', '.join(record.provenance.get('missing', ['an image']))}")
        return differences_from_images(record.pair_id, writer, before=record.before, after=record.after)
    captions = record.provenance.get("captions") or []
    if len(captions) != 2 or not all(isinstance(caption, str) and caption.strip() for caption in captions):
        return Unfit(record.pair_id, "data.writer.mode 'text' needs a caption of each image, and this pair has none; "
                                     "set data.writer.mode to vision")
    return differences_from_captions(record.pair_id, writer, before=captions[0], after=captions[1],
                                     edit=record.provenance.get("edit") or "")
