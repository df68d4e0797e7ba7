"""Stage `tune`: training phase 2, from DiffCap and the aligned model to the model that captions."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path

from onediff import tracking
from onediff.config import Config, load_params, load_runtime
from onediff.data.record import Record, read_records
from onediff.inputs.processing import OneDiffProcessor
from onediff.model.onediff import OneDiffForConditionalGeneration
from onediff.stages import finish_phase, noted_run, quiet, run, silent
from onediff.train import launcher

DIFFCAP = Path("data/diffcap")


def tune() -> None:
    """Writes data/models/tune, data/curves/tune.jsonl and data/runs/tune.json."""
    config, runtime = load_params(), load_runtime()
    tracking.check()
    quiet()
    from onediff.train import phases

    if launcher.hand_over("tune", runtime):
        return
    with noted_run("tune", config) as noted:
        trained = phases.tune(config, runtime, data=DIFFCAP, start=Path("data/models/align"),
                              validator=lambda model, processor: cider_on_val(config, model, processor),
                              log=noted.log if noted else silent)
        finish_phase("tune", trained, noted)


def cider_on_val(config: Config, model: OneDiffForConditionalGeneration,
                 processor: OneDiffProcessor) -> Callable[[], float]:
    """CIDEr on up to `num_val` pairs of split val, the same at every call, shared evenly between the sources."""
    from onediff.eval.caption import caption_records
    from onediff.eval.metrics import cider
    from onediff.model.captioner import Captioner

    sources = sorted(config.tune.mixture)
    share = -(-config.tune.num_val // len(sources))
    pairs: list[Record] = []
    for source in sources:
        found = (record for record in read_records(DIFFCAP, "val-*.parquet") if record.source == source)
        pairs += islice(found, share)
    references = {pair.pair_id: pair.references for pair in pairs}

    def validate() -> float:
        spoken = caption_records(Captioner(model, processor), pairs, config.caption)
        return cider({pair.pair_id: text for pair, text in spoken}, references)

    return validate


if __name__ == "__main__":
    run(tune)
