"""Captions for the pairs of a benchmark, in order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

from tqdm import tqdm

from onediff.config import Caption
from onediff.data.record import Record
from onediff.inputs.images import open_image
from onediff.model.captioner import Captioner


def caption_records(captioner: Captioner, records: Iterable[Record], settings: Caption, *,
                    progress: str | None = None) -> Iterator[tuple[Record, str]]:
    """Every record with its caption, asked as the record says, decoded a batch at a time."""
    rows = iter(records)
    with tqdm(desc=progress, unit="pair", disable=progress is None) as bar:
        while batch := list(islice(rows, settings.batch_size)):
            pairs = [(open_image(record.before), open_image(record.after)) for record in batch]
            spoken = captioner.caption(pairs, instructions=[record.instruction for record in batch],
                                       max_new_tokens=settings.max_new_tokens, num_beams=settings.num_beams)
            bar.update(len(batch))
            yield from zip(batch, spoken, strict=True)
