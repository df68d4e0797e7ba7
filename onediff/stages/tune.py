"""Stage `tune`: training phase 2, from DiffCap and the aligned model to the model that captions."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from onediff.config import Config, Runtime
from onediff.data.record import Record, read_records
from onediff.paths import DIFFCAP
from onediff.stages.command import run
from onediff.stages.training import train

if TYPE_CHECKING:  # torch takes seconds to load, and the old model must return before that
    from onediff.inputs.processing import OneDiffProcessor
    from onediff.model.onediff import OneDiffForConditionalGeneration
    from onediff.train.loop import Judge, Log

ALIGNED = Path("data/models/align")


def tune() -> None:
    """Writes data/models/tune, data/curves/tune.jsonl and data/runs/tune.json."""
    train("tune", start=ALIGNED, work=_work)


def _work(config: Config, runtime: Runtime, folder: Path, log: Log) -> None:
    from onediff.train import phases

    phases.tune(config, runtime, data=DIFFCAP, start=ALIGNED, folder=folder, log=log,
                judge_of=lambda model, processor: cider_on_val(config, model, processor))


def cider_on_val(config: Config, model: OneDiffForConditionalGeneration, processor: OneDiffProcessor) -> Judge:
    """CIDEr on up to `num_val` pairs of split val, the same at every call, shared evenly between the sources."""
    from onediff.eval.caption import caption_records
    from onediff.eval.metrics.ngrams import corpus_cider
    from onediff.model.captioner import Captioner
    from onediff.train.loop import Judge

    sources = sorted(config.tune.mixture)
    share = -(-config.tune.num_val // len(sources))
    pairs: list[Record] = []
    for source in sources:
        found = (record for record in read_records(DIFFCAP, "val-*.parquet") if record.source == source)
        pairs += islice(found, share)
    references = {pair.pair_id: pair.references for pair in pairs}

    def say(numbers: list[int]) -> list[str]:
        chosen = [pairs[number] for number in numbers]
        return [text for _, text in caption_records(Captioner(model, processor), chosen, config.caption, config.tasks)]

    def score(texts: list[str]) -> float:
        return corpus_cider({pair.pair_id: text for pair, text in zip(pairs, texts, strict=True)}, references)

    return Judge(len(pairs), say, score)


if __name__ == "__main__":
    run(tune)
