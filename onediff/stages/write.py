"""Stage `write` adds captions by the writer (a language model) to the records of a source."""

import json
from collections.abc import Iterator
from dataclasses import replace

from onediff.config import Writer, load_params, load_runtime
from onediff.data.record import SPLITS, Record, read_records, write_shards
from onediff.data.writer.answers import Answer, parse
from onediff.data.writer.asking import ask_for_stage
from onediff.data.writer.jobs import Unfit, caption_job, is_captioned, writer_of
from onediff.files import new_folder, write_text
from onediff.paths import PAIRS, WRITTEN
from onediff.stages.command import run


def write(source: str) -> None:
    """Let a language model caption the pairs of a source, and write them to data/written/SOURCE/SPLIT-*.parquet.

    set_aside.jsonl in that folder lists the pairs for which the model gave no usable caption. The model is asked only
    for captions that are not in data/answers yet. Raises ValueError if no pair has a usable caption.
    """
    config = load_params()
    writer = writer_of(source, config, "write")
    answers = ask_for_stage(source, config, load_runtime(), "write")
    written, total = WRITTEN / source, 0
    unusable: list[dict[str, str]] = []
    with new_folder(written) as folder:
        for split in SPLITS:
            if any((PAIRS / source).glob(f"{split}-*.parquet")):
                records = read_records(PAIRS / source, f"{split}-*.parquet")
                captioned = _captioned(records, writer, answers, unusable)
                total += write_shards(captioned, folder, split, shard_pairs=config.data.shard_pairs)
        if not total:
            raise ValueError(f"{written}: the writer (language model) gave no usable caption for any of "
                             f"{len(unusable):,} pairs; the first pair is {unusable[0]['pair_id']}, and the reason "
                             f"is: {unusable[0]['reason']}")
        write_text(folder / "set_aside.jsonl", "".join(json.dumps(row) + "\n" for row in unusable))
    print(f"{written}: {total:,} pairs with captions; {len(unusable):,} without, see set_aside.jsonl for the reasons")


def _captioned(records: Iterator[Record], writer: Writer, answers: dict[str, Answer],
               unusable: list[dict[str, str]]) -> Iterator[Record]:
    """Yield the records that have captions or get captions from the language model; add the others to `unusable`."""
    for record in records:
        if is_captioned(record):
            yield record
            continue
        job = caption_job(record, writer)
        answer = job if isinstance(job, Unfit) else answers[job.key]
        if isinstance(answer, Answer) and answer.status == "ok":
            origin = {"model": writer.model, "mode": writer.mode, "prompts": writer.prompts, "key": answer.key}
            yield replace(record, references=parse(answer.text, "differences")["differences"],
                          provenance=record.provenance | {"writer": origin})
        else:
            status = f"{answer.status}: " if isinstance(answer, Answer) else ""
            unusable.append({"pair_id": record.pair_id, "reason": status + answer.reason})


if __name__ == "__main__":
    run(write)
