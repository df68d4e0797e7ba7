"""Stage `caption` lets the tuned model caption every pair of every benchmark."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import IO

from onediff.config import load_params, load_runtime
from onediff.data.record import read_records
from onediff.files import new_folder
from onediff.library_logs import silence_libraries
from onediff.paths import CAPTIONS, DIFFCAP
from onediff.stages.command import run


def caption(model: str = "data/models/tune") -> None:
    """Let the model caption each pair of the splits `test` and `gate`; write data/captions/SPLIT/BENCHMARK.jsonl."""
    config, runtime = load_params(), load_runtime()
    silence_libraries()
    from onediff.eval.caption import caption_records
    from onediff.model.captioner import Captioner

    captioner = Captioner.load(Path(model), device=runtime.device)
    with new_folder(CAPTIONS) as folder:
        for split in ("test", "gate"):
            (folder / split).mkdir()
            records = read_records(DIFFCAP, f"{split}-*.parquet")
            files: dict[str, IO[str]] = {}
            with ExitStack() as stack:
                for record, text in caption_records(captioner, records, config.caption, config.tasks,
                                                    progress=f"caption {split}"):
                    if record.source not in files:
                        path = folder / split / f"{record.source}.jsonl"
                        files[record.source] = stack.enter_context(path.open("w", encoding="utf-8"))
                    line = {"pair_id": record.pair_id, "prediction": text}
                    files[record.source].write(json.dumps(line, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    run(caption)
