"""Stage `instruct`: an edit for each image of a captioned collection, by the writer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from onediff.config import load_params, load_runtime
from onediff.data.sources.collection import list_collection
from onediff.data.writer.asking import ask
from onediff.data.writer.jobs import jobs, writer_of
from onediff.data.writer.request import Request, edit_of_caption
from onediff.data.writer.store import answers_path, read_answers
from onediff.files import write_text
from onediff.stages.command import run


def instruct(source: str) -> None:
    """Writes data/instructed/<source>.jsonl (name, caption, edit, output) and beside it <source>.set_aside.jsonl."""
    config, runtime = load_params(), load_runtime()
    writer, answered = writer_of(source, config, "instruct"), answers_path(source, "instruct")
    print(ask((job for job in jobs(source, config, "instruct") if isinstance(job, Request)), answered, runtime))
    answers, rows, aside = read_answers(answered), [], []
    for image in list_collection(Path("data/raw") / source):
        answer = answers[edit_of_caption(image.name, writer, caption=image.caption).key]
        if answer.status == "ok":
            rows.append({"name": image.name, "caption": image.caption, **answer.content("edit")})
        else:
            aside.append({"name": image.name, "reason": f"{answer.status}: {answer.reason}"})
    if not rows:
        raise ValueError(f"{source}: no usable edit for any image; the first: {aside[0]['name']}: {aside[0]['reason']}")
    folder = Path("data/instructed")
    _write_lines(rows, folder / f"{source}.jsonl")
    _write_lines(aside, folder / f"{source}.set_aside.jsonl")
    print(f"{folder}/{source}.jsonl: {len(rows):,} edits, {len(aside):,} images set aside")


def _write_lines(rows: list[dict[str, Any]], path: Path) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


if __name__ == "__main__":
    run(instruct)
