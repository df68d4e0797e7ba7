"""Stage `align`: training phase 1, from DiffCap and the backbones to a model folder."""

from __future__ import annotations

from pathlib import Path

from onediff import tracking
from onediff.config import load_params, load_runtime
from onediff.stages import finish_phase, noted_run, quiet, run, silent
from onediff.train import launcher


def align() -> None:
    """Writes data/models/align, data/curves/align.jsonl and data/runs/align.json."""
    config, runtime = load_params(), load_runtime()
    tracking.check()  # before any work: what is trained must have somewhere to be noted
    quiet()
    from onediff.train import phases

    if launcher.hand_over("align", runtime):
        return
    with noted_run("align", config) as noted:
        trained = phases.align(config, runtime, data=Path("data/diffcap"), log=noted.log if noted else silent)
        finish_phase("align", trained, noted)


if __name__ == "__main__":
    run(align)
