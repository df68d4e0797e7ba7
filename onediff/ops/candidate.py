"""What was just trained and scored becomes a version, with all that a version carries."""

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
    """The version's number. Measured once for the same model: the time of a caption here, and the profile that
    `onediff drift` compares with. Lineage and model card are written each time.

    Raises FileNotFoundError for what 'dvc repro' has not made yet, and ValueError unless the scores in data/ are those
    of this very model folder, see `registry.pipeline_evidence`.
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
    """Median milliseconds of a pair of split gate, one at a time, from two decoded images to the sentence.

    Raises FileNotFoundError if the model or the split is not there.
    """
    from onediff.model.captioner import Captioner  # loads torch

    captioner = Captioner.load(folder, device=device)
    times = []
    for record in islice(read_records(data, "gate-*.parquet"), num_pairs + 1):
        pair = (open_image(record.before), open_image(record.after))
        start = time.perf_counter()
        captioner.caption([pair], instructions=[record.instruction])
        times.append((time.perf_counter() - start) * 1000)
    if len(times) < 2:
        raise FileNotFoundError(f"{data}: split gate holds too few pairs to time one; 'dvc repro build' makes it")
    return statistics.median(times[1:])  # the first one warms up
