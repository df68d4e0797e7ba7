"""Check the inputs of a stage that DVC cannot check: installed packages, and folders to which params.yaml refers.

DVC only compares packages.yaml and the dependencies in dvc.yaml with dvc.lock. Therefore, before DVC runs a stage, the
installed versions must equal packages.yaml, and a local model or a folder of photographs must be inside a dependency
of the stage.
"""

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from onediff.config.reading import read_yaml
from onediff.paths import DVC_YAML, PARAMS

PACKAGES = "packages.yaml"
OPTIONAL = {"bpy": "make blender", "pillow-heif": "make heic"}  # optional packages -> the commands that install them
# Keys of params.yaml that may name a local folder, each with the folder tracked by DVC that must contain it.
FOLDERS = {
    "model.vision.path": "presets/backbones",
    "model.language": "presets/backbones",
    "model.delta.init": "presets/backbones",
    "data.clip": "data/pretrained",
    "data.diffusion.pipeline": "data/pretrained",
    "data.edits.photos": "data/own/edits",
}


def check(stage: str) -> None:
    """Check that DVC knows all packages and folders that a stage uses.

    `stage` is the name in DVC's format, such as synthesize@scenes. Raises ValueError with one line for each package
    whose installed version differs from packages.yaml, and for each folder in params.yaml that DVC does not track.
    """
    name, _, source = stage.partition("@")
    description = read_yaml(DVC_YAML)["stages"].get(name, {}) if DVC_YAML.exists() else {}
    deps = {dep.replace("${item.source}", source) for dep in description.get("deps", ())}
    names = [name for item in description.get("params", ()) if isinstance(item, dict)
             for name in item.get(PACKAGES, ())]
    if problems := [*_other_versions(names), *_untracked_folders(deps)]:
        raise ValueError("\n".join(problems))


def _other_versions(names: list[str]) -> Iterator[str]:
    """Yield an error line for each package whose installed version differs from packages.yaml.

    A suffix of the version such as +cpu is ignored, because it only marks a build for other hardware. The version of
    Python is not compared, because dvc.lock must be valid for each Python >= 3.11.
    """
    versions = read_yaml(Path(PACKAGES)) if names else {}
    for name in names:
        try:
            installed = version(name).split("+")[0]
        except PackageNotFoundError:  # It is optional, or the stage fails when it imports the package.
            continue
        if installed != versions[name]:
            yield (f"{PACKAGES}: {name} must be {versions[name]}, the version that DVC records in dvc.lock, but "
                   f"{installed} is installed; '{OPTIONAL.get(name, 'make setup')}' installs that version, or write "
                   f"\"{installed}\" into {PACKAGES}")


def _untracked_folders(deps: set[str]) -> Iterator[str]:
    """Yield an error line for each existing folder in params.yaml that is outside the folder that DVC tracks for it.

    A value that is not an existing folder may be the name of a model on the Hugging Face Hub, so it is not checked.
    `deps` are the dependencies of the stage in dvc.yaml.
    """
    tracked = {key: folder for key, folder in FOLDERS.items() if folder in deps}
    params = read_yaml(PARAMS) if tracked else {}
    for key, folder in tracked.items():
        value: Any = params
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value and Path(value).is_dir() and not Path(value).resolve().is_relative_to(Path(folder).resolve()):
            yield (f"params.yaml: {key}: must be inside {folder}, because DVC does not track other folders, got "
                   f"{value}; run 'cp -r {Path(value).absolute()} {folder}/' ('cp -rs' makes links instead of "
                   f"copies), and set {key} to {folder}/{Path(value).name}")
