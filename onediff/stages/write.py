"""Stage `write`: the records of a source, with captions by the writer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from onediff.config import Writer, load_params, load_runtime
from onediff.data.record import Record, read_records, write_shards
from onediff.data.writer.answer import Answer
from onediff.data.writer.asking import ask
from onediff.data.writer.jobs import caption_job, is_captioned, jobs, splits_of, writer_of
from onediff.data.writer.request import Request
from onediff.data.writer.store import answers_path, read_answers
from onediff.files import new_folder, write_text
from onediff.paths import PAIRS, WRITTEN
from onediff.stages.command import run


def write(source: str) -> None:
    """Writes data/written/<source>/<split>-*.parquet and set_aside.jsonl; asks only what data/answers does not hold."""
    config, runtime = load_params(), load_runtime()
    writer, answered = writer_of(source, config, "write"), answers_path(source, "write")
    print(ask((job for job in jobs(source, config, "write") if isinstance(job, Request)), answered, runtime))
    read, written = PAIRS / source, WRITTEN / source
    answers, total = read_answers(answered), 0
    aside: list[dict[str, Any]] = []
    with new_folder(written) as folder:
        for split in splits_of(read):
            records = _captioned(read_records(read, f"{split}-*.parquet"), writer, answers, aside)
            total += write_shards(records, folder, split, shard_pairs=config.data.shard_pairs)
        if not total:
            raise ValueError(f"{written}: no usable caption for any of {len(aside):,} pairs; the first: "
                             f"{aside[0]['pair_id']}: {aside[0]['reason']}")
        write_text(folder / "set_aside.jsonl", "".join(json.dumps(row) + "\n" for row in aside))
    print(f"{written}: {total:,} pairs with captions, {len(aside):,} set aside (set_aside.jsonl says why)")


def _captioned(records: Iterator[Record], writer: Writer, answers: dict[str, Answer],
               aside: list[dict[str, Any]]) -> Iterator[Record]:
    """The records that have a usable answer, or references already; the others are noted in `aside`."""
    for record in records:
        if is_captioned(record):
            yield record
            continue
        job = caption_job(record, writer)
        answer = answers[job.key] if isinstance(job, Request) else None
        if answer is not None and answer.status == "ok":
            noted = {"model": writer.model, "mode": writer.mode, "prompts": writer.prompts, "key": answer.key}
            yield replace(record, references=answer.content("differences")["differences"],
                          provenance=record.provenance | {"writer": noted})
        else:
            reason = f"{answer.status}: {answer.reason}" if answer else getattr(job, "reason", "")
            aside.append({"pair_id": record.pair_id, "reason": reason})


if __name__ == "__main__":
    run(write)
