"""Captions for the records of a benchmark, in their order."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby, islice

from tqdm import tqdm

from onediff.config import Caption, Task
from onediff.data.record import Record
from onediff.inputs.images import open_image
from onediff.model.captioner import Captioner


def caption_records(captioner: Captioner, records: Iterable[Record], settings: Caption, tasks: Mapping[str, Task], *,
                    progress: str | None = None) -> Iterator[tuple[Record, str]]:
    """Yield each record with the caption that the model wrote for it.

    If the source of a record has an entry in `tasks`, the instruction and the decoding settings of this entry are used.
    Otherwise, the instruction of the record and the decoding settings of `settings` are used. `progress` is the label
    of a progress bar; None shows no bar.
    """
    with tqdm(desc=progress, unit="pair", disable=progress is None) as bar:
        for (max_new_tokens, num_beams), rows in groupby(records, key=lambda record: decoding(record, settings, tasks)):
            while batch := list(islice(rows, settings.batch_size)):
                pairs = [(open_image(record.before), open_image(record.after)) for record in batch]
                instructions = [(record.source in tasks and tasks[record.source].instruction) or record.instruction
                                for record in batch]
                captions = captioner.caption(pairs, instructions=instructions, max_new_tokens=max_new_tokens,
                                             num_beams=num_beams)
                bar.update(len(batch))
                yield from zip(batch, captions, strict=True)


def decoding(record: Record, settings: Caption, tasks: Mapping[str, Task]) -> tuple[int, int]:
    """Return max_new_tokens and num_beams for a record: the values of the task if it sets them, else the defaults."""
    task = tasks.get(record.source)
    return ((task and task.max_new_tokens) or settings.max_new_tokens,
            (task and task.num_beams) or settings.num_beams)
