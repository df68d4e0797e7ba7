"""What DVC cannot see by itself: the installed packages, and folders that params.yaml names.

DVC compares dvc.lock with packages.yaml and with the deps of dvc.yaml. So before a stage runs under DVC, the installed
versions must be those of packages.yaml, and a local model or a folder of photographs must lie in a dep of the stage.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from onediff.paths import DVC_YAML, PARAMS

PACKAGES = "packages.yaml"
FOLDERS = {  # key of params.yaml that may name a local folder -> the dep of dvc.yaml in which the folder must lie
    "model.vision.path": "presets/backbones",
    "model.language": "presets/backbones",
    "model.delta.init": "presets/backbones",
    "data.clip": "data/pretrained",
    "data.diffusion.pipeline": "data/pretrained",
    "data.edits.photos": "data/own/edits",
}


def check(stage: str) -> None:
    """`stage`: as DVC names it, such as synthesize@scenes. Raises ValueError with one line per package and folder."""
    name, _, source = stage.partition("@")
    description = _read(DVC_YAML)["stages"].get(name, {}) if DVC_YAML.exists() else {}
    deps = {dep.replace("${item.source}", source) for dep in description.get("deps", ())}
    problems = [*_other_versions(description), *_untracked_folders(deps)]
    if problems:
        raise ValueError("\n".join(problems))


def _other_versions(description: dict[str, Any]) -> list[str]:
    """Local labels such as +cpu do not count: they name a build for other hardware. Python's version does not count
    either: no stage's bytes were seen to depend on it, and a checkout's dvc.lock must hold for each Python >= 3.11.
    """
    names = [name for item in description.get("params", ()) if isinstance(item, dict)
             for name in item.get(PACKAGES, ())]
    versions, problems = _read(Path(PACKAGES)) if names else {}, []
    for name in names:
        try:
            installed = version(name).split("+")[0]
        except PackageNotFoundError:  # bpy is optional; a stage that needs another missing package fails at its import
            continue
        if installed != versions[name]:
            problems.append(f"{PACKAGES}: {name} must be {versions[name]}, which DVC notes in dvc.lock, but "
                            f"{installed} is installed; 'make setup' installs the version of requirements.lock, or "
                            f"write \"{installed}\" into {PACKAGES}")
    return problems


def _untracked_folders(deps: set[str]) -> Iterator[str]:
    """One line for each existing folder that params.yaml names and no dep contains. A path that does not exist may be
    a name on the hub.
    """
    tracked = {key: folder for key, folder in FOLDERS.items() if folder in deps}
    params = _read(PARAMS) if tracked else {}
    for key, folder in tracked.items():
        value: Any = params
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value and Path(value).is_dir() and not Path(value).resolve().is_relative_to(Path(folder).resolve()):
            yield (f"params.yaml: {key}: must lie in {folder}, because DVC sees no change elsewhere, got {value}; "
                   f"'cp -r {Path(value).absolute()} {folder}/' ('cp -rs' only links the files), and write "
                   f"{folder}/{Path(value).name}")


def _read(path: Path) -> Any:
    return YAML(typ="safe").load(path.read_text(encoding="utf-8"))
