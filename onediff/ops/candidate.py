"""Registration of the model that the pipeline has just trained and scored, with lineage, model card and profile."""

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
    """Register a model folder in MLflow and return the number of the model version.

    The version contains its lineage and its model card. A model that is registered for the first time is also measured:
    the time for one caption on this machine, and the profile that `onediff drift` compares recent captions with.

    Raises FileNotFoundError if 'dvc repro' has not produced a needed file yet, and ValueError if the scores in data/
    do not belong to this model folder, see `registry.pipeline_evidence`.
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
    """Return the median time in milliseconds to caption one pair of the `gate` split.

    Pairs are captioned one at a time. The time does not include the decoding of the two image files. Raises
    FileNotFoundError if the model or the split does not exist.
    """
    from onediff.model.captioner import Captioner  # This import loads torch, which takes seconds.

    captioner = Captioner.load(folder, device=device)
    times = []
    for record in islice(read_records(data, "gate-*.parquet"), num_pairs + 1):
        pair = (open_image(record.before), open_image(record.after))
        start = time.perf_counter()
        captioner.caption([pair])
        times.append((time.perf_counter() - start) * 1000)
    if len(times) < 2:
        raise FileNotFoundError(f"{data}: the `gate` split has too few pairs to measure the time of a caption: run "
                                "'dvc repro build'")
    return statistics.median(times[1:])  # The first caption is slower, because it initializes torch.
