"""How long the model takes for one pair on this machine."""

from __future__ import annotations

import statistics
import time
from itertools import islice
from pathlib import Path


def caption_ms(folder: Path, data: Path, *, num_pairs: int = 20, device: str = "auto") -> float:
    """Median milliseconds of a pair of split gate, one at a time, from two decoded images to the sentence.

    Raises FileNotFoundError if the model or the split is not there.
    """
    from onediff.data.record import read_records
    from onediff.inputs.images import open_image
    from onediff.model.captioner import Captioner

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
