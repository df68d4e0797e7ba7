"""What any system says about the pairs of a benchmark, and their references: the files that score and compare read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from onediff.config import Config, load_params, load_runtime
from onediff.data.record import Record, read_records, read_table
from onediff.inputs.images import open_image
from onediff.library_logs import silence_libraries
from onediff.paths import DIFFCAP, TRAINED

if TYPE_CHECKING:
    from PIL import Image

    Pair = tuple[Image.Image, Image.Image]

System = Callable[[Iterator[Record]], Iterator[tuple[Record, str]]]
REFERENCES = ("pair_id", "references", "group_id", "change_type")


def write_predictions(benchmark: str, system: System, out: Path, *, split: str = "test", data: Path = DIFFCAP) -> int:
    """A line {"pair_id", "prediction"} for every pair, in order; the number of them. All or nothing: under its name the
    file is whole.

    Raises ValueError if the split has no such benchmark.
    """
    check_benchmark(benchmark, split, data)
    records = (record for record in read_records(data, f"{split}-*.parquet") if record.source == benchmark)
    return write_lines(out, ({"pair_id": record.pair_id, "prediction": text} for record, text in system(records)))


def write_references(benchmark: str, out: Path, *, split: str = "test", data: Path = DIFFCAP) -> int:
    """A line for every pair, in order, with what `onediff score` reads; the number of them. Raises as above."""
    rows = [row for row in read_table(data, f"{split}-*.parquet") if row["source"] == benchmark]
    check_benchmark(benchmark, split, data)
    return write_lines(out, ({key: row[key] for key in REFERENCES} for row in rows))


def check_benchmark(benchmark: str, split: str, data: Path = DIFFCAP) -> None:
    """Raises ValueError if the split has no such benchmark."""
    there = list(dict.fromkeys(row["source"] for row in read_table(data, f"{split}-*.parquet")))
    if benchmark not in there:
        raise ValueError(f"{data}: split {split} has no benchmark '{benchmark}'; it has {', '.join(there)}")


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """JSONL, made beside its place and moved there when it is whole; the number of lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part, number = path.with_name(path.name + ".part"), 0
    try:
        with part.open("w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                number += 1
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return number


# --- systems ---------------------------------------------------------------------------------------------------------


def onediff(folder: Path) -> System:
    """A trained model, asked and decoded as the stage `caption` does it."""
    config, device = _settings()
    from onediff.eval.caption import caption_records
    from onediff.model.captioner import Captioner

    captioner = Captioner.load(folder, device=device)
    return lambda records: caption_records(captioner, records, config.caption, config.tasks, progress="caption")


def chat(name: str, *, prompt: str | None = None, batch_size: int = 8) -> tuple[System, str]:
    """A chat model of transformers and its prompt, which holds the question that OneDiff is asked about the pair."""
    config, device = _settings()
    from onediff.baselines.chat import PROMPT, ChatCaptioner
    from onediff.eval.caption import decoding

    captioner = ChatCaptioner.load(name, prompt=prompt or PROMPT, device=device)

    def say(records: list[Record], pairs: list[Pair]) -> list[str]:
        longest = max(decoding(record, config.caption, config.tasks)[0] for record in records)
        return captioner.caption(pairs, [question(record, config) for record in records], max_new_tokens=longest)

    return lambda records: _batches(records, say, batch_size), captioner.prompt


def siamese_cnn(folder: Path, *, batch_size: int = 64) -> System:
    """The CNN that `python -m benchmarks.baselines` trained."""
    from onediff.baselines.siamese_cnn import SiameseCaptioner

    captioner = SiameseCaptioner.load(folder)
    return lambda records: _batches(records, lambda _, pairs: captioner.caption(pairs), batch_size)


def folder_of(model: str) -> Path:
    """A model folder, or that of a registered version. Raises FileNotFoundError or ValueError if there is none."""
    if model.startswith("models:/"):
        from onediff.registry import model_folder

        return model_folder(model)
    if not (Path(model) / "config.json").exists():
        cure = (f"name another one, such as {TRAINED} or models:/onediff@champion" if TRAINED.exists() else
                f"'make run' trains one in {TRAINED}; 'dvc checkout {TRAINED}' brings back the last one that DVC's "
                "cache has")
        raise FileNotFoundError(f"{model} is not a model folder (it has no config.json): {cure}")
    return Path(model)


def question(record: Record, config: Config) -> str:
    """What its task, or else the record asks about a pair."""
    task = config.tasks.get(record.source)
    return (task and task.instruction) or record.instruction


def _settings() -> tuple[Config, str]:
    config, runtime = load_params(), load_runtime()
    silence_libraries()
    return config, runtime.device


def _batches(records: Iterator[Record], say: Callable[[list[Record], list[Pair]], list[str]],
             size: int) -> Iterator[tuple[Record, str]]:
    with tqdm(desc="caption", unit="pair") as bar:
        while batch := list(islice(records, size)):
            spoken = say(batch, [(open_image(record.before), open_image(record.after)) for record in batch])
            bar.update(len(batch))
            yield from zip(batch, spoken, strict=True)
