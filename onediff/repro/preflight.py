"""Check before the first stage of a run that all inputs to which params.yaml refers exist on this machine."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from onediff.config import Config, Data
from onediff.config.reading import did_you_mean
from onediff.data.folders import sources_of
from onediff.files import read_json
from onediff.paths import CARD, DIFFCAP, DVC_LOCK, RAW
from onediff.repro.lock import Stage, read_dvc_lock


def check_inputs(config: Config) -> None:
    """Check that each dataset, model and folder named in params.yaml exists on this machine.

    Raises ValueError with one line for each missing one. An input may be missing if dvc.lock shows that a stage has
    already run with this input.
    """
    from onediff.data.sources.catalog import CATALOG

    stages = read_dvc_lock() if DVC_LOCK.exists() else {}
    used = {text for stage in stages.values() for text in _texts(stage.params)}
    data, sources = config.data, sources_of(config.data)
    lines = [*_raw_folders(data, stages), *_photographs(data, used)]
    if all(source in (*data.retrieved, *data.diffused)
           or (source in CATALOG and CATALOG[source].expected.keys() == {"train"}) for source in sources):
        lines.append(f"data: at least one source must have pairs for the splits val, gate and test, but "
                     f"{', '.join(sources)} have only training pairs; add a benchmark or your pairs to data.raw, or "
                     "scenes to data.generated")
    checkpoints = {"model.vision.path": config.model.vision.path, "model.language": config.model.language,
                   "model.delta.init": config.model.delta.init, "data.clip": data.clip,
                   "data.diffusion.pipeline": data.diffusion and data.diffusion.pipeline}
    lines += [f"{key}: folder {path} does not exist; correct the path, or use a model of the Hugging Face Hub"
              for key, path in checkpoints.items()
              if path and path not in used and path.startswith(("presets/", ".", "/")) and not Path(path).is_dir()]
    if lines:
        raise ValueError("\n".join(f"params.yaml: {line}" for line in lines))


def check_mixtures(config: Config) -> None:
    """Check that each source in the training mixtures of params.yaml has training pairs in data/diffcap.

    Raises ValueError with one line for each source without training pairs. If `tune.validate_every` is set, at least
    one source of tune.mixture must also have validation pairs.
    """
    counts = read_json(CARD)["num_pairs"]
    lines = [f"{name}.mixture: '{source}' has no training pairs in {DIFFCAP}; add pairs to this source, or remove it "
             "from the mixture" for name, phase in (("align", config.align), ("tune", config.tune)) if phase
             for source in phase.mixture if source not in counts["train"]]
    if config.tune.validate_every and not counts["val"].keys() & config.tune.mixture.keys():
        lines.append(f"tune.validate_every: a source of tune.mixture must have pairs in split val of {DIFFCAP}, but "
                     "none has; add pairs, or set tune.validate_every to null")
    if lines:
        raise ValueError("\n".join(f"params.yaml: {line}" for line in lines))


def _texts(value: Any) -> Iterator[str]:
    """Yield every string in the parameters that dvc.lock records for a stage, which may be nested.

    If a string is the path of an input, this input existed when the stage ran.
    """
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)


def _raw_folders(data: Data, stages: dict[str, Stage]) -> Iterator[str]:
    """Yield an error line for each data source whose folder in data/raw does not exist and that no stage has read."""
    for key, stage in (("raw", "read"), ("retrieved", "retrieve"), ("diffused", "diffuse")):
        for source in getattr(data, key):
            folder = RAW / source
            if not folder.is_dir() and not Path(f"{folder}.dvc").exists() and f"{stage}@{source}" not in stages:
                folders = [path.name for path in sorted(RAW.glob("*")) if path.is_dir()]
                cure = f"see data/README.md for the content of this folder, or remove '{source}' from data.{key}"
                yield (f"data.{key}: '{source}' needs the folder {folder}, which does not exist; "
                       + did_you_mean(source, folders, cure))


def _photographs(data: Data, used: set[str]) -> Iterator[str]:
    """Yield an error line for each split for which the folder data.edits.photos contains no photograph."""
    folder = data.edits.photos
    if folder is None or folder in used or "edits" not in data.generated or data.edits.shares.photograph == 0:
        return
    from onediff.data.record import SPLITS
    from onediff.data.synthesis.edits.photographs import photo_paths

    for split in SPLITS:
        try:
            photo_paths(split, folder)
        except (FileNotFoundError, ValueError) as error:
            yield str(error)
            if isinstance(error, FileNotFoundError):  # If the folder does not exist, all splits have the same error.
                return
