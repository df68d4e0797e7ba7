"""Stage `caption` lets the tuned model caption every pair of every benchmark."""

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from onediff.config import load_params, load_runtime
from onediff.data.record import Record, read_records, read_table
from onediff.eval.questions import GENERATED, PARAPHRASES, sample
from onediff.files import new_folder
from onediff.library_logs import silence_libraries
from onediff.paths import CAPTIONS, DIFFCAP, OWN_QUESTION, PARAPHRASED
from onediff.stages.command import run

TESTS = "test-*.parquet"


def caption(model: str = "data/models/tune") -> None:
    """Let the model caption the pairs, and write data/captions/FOLDER/BENCHMARK.jsonl.

    The folders `test` and `gate` have one caption for each pair of the split. For generated benchmarks of the `test`
    split, `own_question` has the captions that answer the question in each record, and `paraphrases` the captions of a
    sample of pairs for each paraphrase of the default question. Every line states the question.
    """
    config, runtime = load_params(), load_runtime()
    silence_libraries()
    from onediff.eval.caption import benchmark_question, caption_records
    from onediff.model.captioner import Captioner

    captioner = Captioner.load(Path(model), device=runtime.device)

    def write(folder: Path, records: Iterable[Record], name: str) -> None:
        """Caption records, each with the question in its `instruction`, and append the captions to the files."""
        captions = caption_records(captioner, records, config.caption, config.tasks,
                                   question=lambda record: record.instruction, progress=f"caption {name}")
        for record, text in captions:
            line = {"pair_id": record.pair_id, "question": record.instruction, "prediction": text}
            with (folder / f"{record.source}.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

    with new_folder(CAPTIONS) as folder:
        for name in ("test", "gate", OWN_QUESTION.name, PARAPHRASED.name):
            (folder / name).mkdir()
        for split in ("test", "gate"):
            records = read_records(DIFFCAP, f"{split}-*.parquet")
            write(folder / split, (replace(record, instruction=benchmark_question(record, config.tasks))
                                   for record in records), split)
        write(folder / OWN_QUESTION.name, (record for record in read_records(DIFFCAP, TESTS)
                                           if record.source in GENERATED), "own questions")
        chosen = _sampled(config.caption.num_paraphrased)
        for number, text in enumerate(PARAPHRASES, start=1):
            write(folder / PARAPHRASED.name, (replace(record, instruction=text) for record in chosen),
                  f"paraphrase {number}")


def _sampled(count: int) -> list[Record]:
    """Return about `count` random test pairs of each generated benchmark, in the order of the data."""
    rows = read_table(DIFFCAP, TESTS)
    chosen = {pair_id for source in GENERATED
              for pair_id in sample([row for row in rows if row["source"] == source], count)}
    return [record for record in read_records(DIFFCAP, TESTS) if record.pair_id in chosen]


if __name__ == "__main__":
    run(caption)
