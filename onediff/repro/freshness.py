"""What DVC cannot see by itself: the installed packages, and folders that params.yaml names.

DVC compares dvc.lock with packages.yaml and with the deps of dvc.yaml. So before a stage runs under DVC, the installed
versions must be those of packages.yaml, and a local model or a folder of photographs must lie in a dep of the stage.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

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
    described = _read(Path("dvc.yaml"))["stages"].get(name, {}) if Path("dvc.yaml").exists() else {}
    deps = {dep.replace("${item.source}", source) for dep in described.get("deps", ())}
    wrong = [*_other_versions(described), *_untracked_folders(deps)]
    if wrong:
        raise ValueError("\n".join(wrong))


def _other_versions(described: dict[str, Any]) -> list[str]:
    """Local labels such as +cpu do not count: they name a build for other hardware. Python's version does not count
    either: no stage's bytes were seen to depend on it, and a checkout's dvc.lock must hold for each Python >= 3.11.
    """
    named = [name for item in described.get("params", ()) if isinstance(item, dict) for name in item.get(PACKAGES, ())]
    wanted, wrong = _read(Path(PACKAGES)) if named else {}, []
    for name in named:
        installed = _installed(name)
        if installed not in (None, wanted[name]):
            wrong.append(f"{PACKAGES}: {name} must be {wanted[name]}, which DVC notes in dvc.lock, but {installed} is "
                         f"installed; 'make setup' installs the version of requirements.lock, or write \"{installed}\" "
                         f"into {PACKAGES}")
    return wrong


def _installed(name: str) -> str | None:
    """None if it is not installed. bpy is optional; a stage that needs another missing package fails at its import."""
    try:
        return version(name).split("+")[0]
    except PackageNotFoundError:
        return None


def _untracked_folders(deps: set[str]) -> list[str]:
    if not deps.intersection(FOLDERS.values()):
        return []
    params = _read(Path("params.yaml"))
    return [f"params.yaml: {key}: must lie in {folder}, because DVC sees no change elsewhere, got {value}; "
            f"'cp -r {Path(value).absolute()} {folder}/' ('cp -rs' only links the files), and write "
            f"{folder}/{Path(value).name}"
            for key, folder in FOLDERS.items()
            if folder in deps and (value := _value(params, key)) and _is_outside(Path(value), Path(folder))]


def _value(params: dict[str, Any], key: str) -> str | None:
    node: Any = params
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node


def _is_outside(path: Path, folder: Path) -> bool:
    """Whether `path` is an existing folder outside of `folder`. A path that does not exist may be a name on the hub."""
    return path.is_dir() and folder.resolve() not in (path.resolve(), *path.resolve().parents)


def _read(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    return loaded
