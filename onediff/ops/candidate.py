"""What was just trained and scored becomes a version, with all that a version carries."""

from __future__ import annotations

import tempfile
from pathlib import Path

from onediff import registry
from onediff.config import load_params
from onediff.library_logs import silence_libraries
from onediff.ops.drift import write_profile
from onediff.ops.lineage import write_lineage
from onediff.paths import DIFFCAP
from onediff.serve.card import write_card
from onediff.serve.latency import caption_ms


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
