"""Caption the records of a benchmark, in the order of the records."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import groupby, islice

from tqdm import tqdm

from onediff.config import Caption, Task
from onediff.data.record import Record
from onediff.inputs.images import open_image
from onediff.inputs.prompt import DEFAULT_INSTRUCTION
from onediff.model.captioner import Captioner


def caption_records(captioner: Captioner, records: Iterable[Record], settings: Caption, tasks: Mapping[str, Task], *,
                    question: Callable[[Record], str] | None = None,
                    progress: str | None = None) -> Iterator[tuple[Record, str]]:
    """Yield each record together with the caption that the model writes for the two images of the record.

    `question` returns the question that the model is asked about a record; None asks `benchmark_question`. `tasks` maps
    a source (dataset) to a task. If the task of a record's source sets max_new_tokens or num_beams, this value is used;
    otherwise the value comes from `settings`. `progress` is the label of a progress bar; None shows no bar.
    """
    with tqdm(desc=progress, unit="pair", disable=progress is None) as bar:
        for (max_new_tokens, num_beams), rows in groupby(records, key=lambda record: decoding(record, settings, tasks)):
            while batch := list(islice(rows, settings.batch_size)):
                pairs = [(open_image(record.before), open_image(record.after)) for record in batch]
                instructions = [question(record) if question else benchmark_question(record, tasks)
                                for record in batch]
                captions = captioner.caption(pairs, instructions=instructions, max_new_tokens=max_new_tokens,
                                             num_beams=num_beams)
                bar.update(len(batch))
                yield from zip(batch, captions, strict=True)


def benchmark_question(record: Record, tasks: Mapping[str, Task]) -> str:
    """Return the question with which the pairs of the record's benchmark are captioned and scored.

    It is the default question of `onediff caption`, unless the section `tasks` of params.yaml has an instruction for
    the source, as the protocols of published benchmarks need it.
    """
    task = tasks.get(record.source)
    return (task and task.instruction) or DEFAULT_INSTRUCTION


def decoding(record: Record, settings: Caption, tasks: Mapping[str, Task]) -> tuple[int, int]:
    """Return max_new_tokens and num_beams for captioning a record.

    Each value comes from the task of the record's source if this task sets the value, otherwise from `settings`.
    """
    task = tasks.get(record.source)
    return ((task and task.max_new_tokens) or settings.max_new_tokens,
            (task and task.num_beams) or settings.num_beams)
