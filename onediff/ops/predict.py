"""Captions of any system for a benchmark, in the files that `onediff score` and `onediff compare` read."""

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from onediff.config import load_params, load_runtime
from onediff.data.record import Record, read_records, read_table
from onediff.eval import caption_files
from onediff.inputs.images import open_image
from onediff.library_logs import silence_libraries
from onediff.paths import CHAMPION, DIFFCAP, TRAINED

Pair = tuple[Image.Image, Image.Image]
System = Callable[[Iterator[Record]], Iterator[tuple[Record, str]]]


def write_predictions(benchmark: str, system: System, out: Path, *, split: str = "test",
                      form: caption_files.Form = "jsonl") -> int:
    """Caption every pair of a benchmark with `system`, and write the captions in the order of the data to a file.

    Return the number of pairs. Raises ValueError if the split has no such benchmark.
    """
    check_benchmark(benchmark, split)
    records = (record for record in read_records(DIFFCAP, f"{split}-*.parquet") if record.source == benchmark)
    return caption_files.write_predictions(out, ((record.pair_id, text) for record, text in system(records)), form)


def write_references(benchmark: str, out: Path, *, split: str = "test", form: caption_files.Form = "jsonl") -> int:
    """Write the reference captions of each pair of a benchmark, in the order of the data, to a file.

    Return the number of pairs. Raises ValueError if the split has no such benchmark.
    """
    check_benchmark(benchmark, split)
    rows = (row for row in read_table(DIFFCAP, f"{split}-*.parquet") if row["source"] == benchmark)
    return caption_files.write_references(out, rows, form)


def check_benchmark(benchmark: str, split: str) -> None:
    """Raise ValueError if the split has no pairs of this benchmark."""
    benchmarks = list(dict.fromkeys(row["source"] for row in read_table(DIFFCAP, f"{split}-*.parquet")))
    if benchmark not in benchmarks:
        raise ValueError(f"{DIFFCAP}: split {split} has no benchmark '{benchmark}'; its benchmarks are "
                         f"{', '.join(benchmarks)}")


def onediff(folder: Path) -> System:
    """Load a trained OneDiff model, and return a function that captions records with the model.

    Questions and decoding settings are those of the DVC stage `caption`.
    """
    config = load_params()
    silence_libraries()
    from onediff.eval.caption import caption_records
    from onediff.model.captioner import Captioner

    captioner = Captioner.load(folder, device=load_runtime().device)
    return lambda records: caption_records(captioner, records, config.caption, config.tasks, progress="caption")


def chat(name: str, *, prompt: str | None = None, batch_size: int = 8) -> tuple[System, str]:
    """Load a chat model of transformers; return a function that captions records with it, and the complete prompt.

    The placeholder {question} in the prompt is replaced by the question that OneDiff is asked about the pair.
    """
    config = load_params()
    silence_libraries()
    from onediff.baselines.chat import PROMPT, ChatCaptioner
    from onediff.eval.caption import benchmark_question, decoding

    captioner = ChatCaptioner.load(name, prompt=prompt or PROMPT, device=load_runtime().device)

    def caption(records: list[Record], pairs: list[Pair]) -> list[str]:
        longest = max(decoding(record, config.caption, config.tasks)[0] for record in records)
        questions = [benchmark_question(record, config.tasks) for record in records]
        return captioner.caption(pairs, questions, max_new_tokens=longest)

    return lambda records: _caption_batches(records, caption, batch_size), captioner.prompt


def siamese_cnn(folder: Path) -> System:
    """Load the CNN that `python -m benchmarks.baselines` trained; return a function that captions records with it."""
    from onediff.baselines.siamese_cnn import SiameseCaptioner

    captioner = SiameseCaptioner.load(folder)
    return lambda records: _caption_batches(records, lambda _, pairs: captioner.caption(pairs), batch_size=64)


def folder_of(model: str) -> Path:
    """Return the folder of `model`, which is a path or the address of a registered version such as models:/onediff/3.

    Raises FileNotFoundError if the path is not a model folder, ValueError if the version cannot be used.
    """
    if model.startswith("models:/"):
        from onediff.registry import model_folder

        return model_folder(model)
    if not (Path(model) / "config.json").exists():
        cure = (f"give another model, such as {TRAINED} or {CHAMPION}" if (TRAINED / "config.json").exists() else
                f"'make run' trains one in {TRAINED}; 'dvc checkout {TRAINED}' restores the last one from DVC's "
                "cache")
        raise FileNotFoundError(f"{model} is not a model folder (it has no config.json): {cure}")
    return Path(model)


def _caption_batches(records: Iterator[Record], caption: Callable[[list[Record], list[Pair]], list[str]],
                     batch_size: int) -> Iterator[tuple[Record, str]]:
    with tqdm(desc="caption", unit="pair") as bar:
        while batch := list(islice(records, batch_size)):
            captions = caption(batch, [(open_image(record.before), open_image(record.after)) for record in batch])
            bar.update(len(batch))
            yield from zip(batch, captions, strict=True)
