"""Registration of the trained model: a version with lineage, model card, caption time and drift profile."""

import statistics
import tempfile
import time
from itertools import islice
from pathlib import Path

from onediff import registry
from onediff.config import load_params
from onediff.data.record import read_records
from onediff.inputs.images import open_image
from onediff.library_logs import silence_libraries
from onediff.ops.drift import write_profile
from onediff.ops.lineage import write_lineage
from onediff.paths import DIFFCAP
from onediff.serve.card import write_card


def register(model: Path, *, run_id: str | None = None, evaluation_run: str | None = None,
             by: str | None = None) -> str:
    """Register the model folder as a version, give it the alias `candidate`, and return the number of the version.

    Lineage and model card are written each time. The time of one caption on this machine, and the profile with which
    `onediff drift` compares later captions, are measured only for a new model.

    Raises FileNotFoundError for files that 'dvc repro' has not created yet, and ValueError unless the scores in data/
    belong to this model folder (`registry.pipeline_evidence`).
    """
    evidence = registry.pipeline_evidence(model)
    with tempfile.TemporaryDirectory() as scratch:
        carried = Path(scratch)
        write_lineage(carried, evaluation_run=evaluation_run)
        write_card(carried)
        measured = {}
        if registry.version_with(evidence.model.folder) is None:
            silence_libraries()
            measured["caption_ms"] = caption_ms(model, DIFFCAP)
            if drift := load_params().drift:
                write_profile(carried, model, num_pairs=drift.num_pairs)
        return registry.register(evidence, run_id=run_id, carried=carried, measured=measured, by=by)


def caption_ms(folder: Path, data: Path, *, num_pairs: int = 20, device: str = "auto") -> float:
    """Return the median time, in milliseconds, of captioning one pair of the `gate` split, from decoded images on.

    Raises FileNotFoundError if the model or the split does not exist.
    """
    from onediff.model.captioner import Captioner  # This import loads torch, which takes seconds.

    captioner = Captioner.load(folder, device=device)
    times = []
    for record in islice(read_records(data, "gate-*.parquet"), num_pairs + 1):
        pair = (open_image(record.before), open_image(record.after))
        start = time.perf_counter()
        captioner.caption([pair], instructions=[record.instruction])
        times.append((time.perf_counter() - start) * 1000)
    if len(times) < 2:
        raise FileNotFoundError(f"{data}: split gate must have at least 2 pairs to measure the time of a caption, got "
                                f"{len(times)}; run 'dvc repro build' to create the split")
    return statistics.median(times[1:])  # The first caption takes longer, because caches are empty.
