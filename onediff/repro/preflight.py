"""Compares params.yaml with what is on this machine, before the first stage of a run: folders, splits, mixtures."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from onediff.config import Config, Data
from onediff.data.folders import sources_of
from onediff.paths import DIFFCAP
from onediff.repro.lock import LOCK, Stage, locked

RAW = Path("data/raw")


def check_inputs(config: Config) -> None:
    """Raises ValueError with one line for each thing that params.yaml names and this machine does not have.

    What dvc.lock already has a result for may be absent.
    """
    stages = locked() if LOCK.exists() else {}
    used = {text for stage in stages.values() for text in _texts(stage.params)}
    lines = [*_raw_folders(config.data, stages), *_photographs(config.data, used), *_empty_splits(config.data),
             *_checkpoints(config, used)]
    if lines:
        raise ValueError("\n".join(f"params.yaml: {line}" for line in lines))


def check_mixtures(config: Config) -> None:
    """Raises ValueError with one line for each source of a mixture that has no pairs in data/diffcap."""
    counts = json.loads((DIFFCAP / "card.json").read_text(encoding="utf-8"))["num_pairs"]
    phases = {"align": config.align, "tune": config.tune}
    lines = [f"{name}.mixture: '{source}' has no pair in split train of {DIFFCAP}; add pairs, or remove it from the "
             "mixture" for name, phase in phases.items() if phase for source in phase.mixture
             if source not in counts["train"]]
    if config.tune.validate_every and not counts["val"].keys() & config.tune.mixture.keys():
        lines.append(f"tune.validate_every: no source of tune.mixture has a pair in split val of {DIFFCAP}; add "
                     "pairs, or set it to null")
    if lines:
        raise ValueError("\n".join(f"params.yaml: {line}" for line in lines))


def _texts(value: Any) -> Iterator[str]:
    """Every text in nested parameters: a path among them was there when a stage of dvc.lock ran."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)


def _raw_folders(data: Data, stages: dict[str, Stage]) -> Iterator[str]:
    reader = {"raw": "read", "retrieved": "retrieve", "diffused": "diffuse"}
    for key, stage in reader.items():
        for source in getattr(data, key):
            folder = RAW / source
            if not folder.is_dir() and not Path(f"{folder}.dvc").exists() and f"{stage}@{source}" not in stages:
                there = sorted(path.name for path in RAW.glob("*") if path.is_dir())
                near = difflib.get_close_matches(source, there, 1)
                yield (f"data.{key}: '{source}' needs the folder {folder}, which does not exist; "
                       + (f"did you mean '{near[0]}'?" if near else "see data/README.md for what belongs there, or "
                          f"remove '{source}'"))


def _photographs(data: Data, used: set[str]) -> Iterator[str]:
    folder = data.edits.photos
    if folder is None or folder in used or "edits" not in data.generated or data.edits.canvas_share == 1:
        return
    from onediff.data.record import SPLITS
    from onediff.data.synthesis.edits import photo_paths

    for split in SPLITS:
        try:
            photo_paths(split, folder)
        except FileNotFoundError as error:
            yield str(error)
            return
        except ValueError as error:
            yield str(error)


def _empty_splits(data: Data) -> Iterator[str]:
    from onediff.data.sources.catalog import CATALOG

    for source in sources_of(data):
        is_collection = source in (*data.retrieved, *data.diffused)
        if not is_collection and (source not in CATALOG or CATALOG[source].expected.keys() != {"train"}):
            return
    yield (f"data: the sources {', '.join(sources_of(data))} have pairs for split train only, so val, gate and test "
           "would be empty; add a benchmark or pairs of your own to data.raw, or scenes to data.generated")


def _checkpoints(config: Config, used: set[str]) -> Iterator[str]:
    named = {"model.vision.path": config.model.vision.path, "model.language": config.model.language,
             "model.delta.init": config.model.delta.init, "data.clip": config.data.clip,
             "data.diffusion.pipeline": config.data.diffusion and config.data.diffusion.pipeline}
    for key, path in named.items():
        if path and path not in used and path.startswith(("presets/", ".", "/")) and not Path(path).is_dir():
            yield f"{key}: folder {path} does not exist; correct the path, or name a model of the Hugging Face hub"
