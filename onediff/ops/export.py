"""A version as a folder of its own, that loads without this project's data and could be put on a hub."""

from __future__ import annotations

import shutil
import tempfile
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from onediff import registry
from onediff.ops import lineage

LICENCE = "LICENSE"


def export(version: str, folder: Path) -> Path:
    """Writes model, processor, README.md (the model card), licence and lineage.json; whole, or not at all.

    Raises ValueError if the folder is there and not empty, or the registered files are not those of their digest;
    FileNotFoundError if the version carries no model card.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there and not empty: name a new folder")
    found = lineage.told(version)
    uri = lineage.uri_of(version)
    carried, model = registry.version_files(uri), registry.model_folder(uri)
    if not (carried / "README.md").exists():
        raise FileNotFoundError(f"{carried / 'README.md'} not found: version {found['version']} has no model card; "
                                "register it again")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        part = Path(scratch) / "whole"
        shutil.copytree(model, part)
        for path in (carried / "README.md", carried / lineage.FOLDER / "lineage.json", _licence()):
            shutil.copyfile(path, part / path.name)
        part.chmod(0o755)
        if folder.exists():
            folder.rmdir()
        part.rename(folder)
    return folder


def _licence() -> Path:
    """Beside the code in a clone, or in what is installed."""
    beside = Path(__file__).parents[2] / LICENCE
    if beside.exists():
        return beside
    try:
        found = [path for path in files("onediff-idc") or () if path.name == LICENCE]
    except PackageNotFoundError:
        found = []
    if not found:
        raise FileNotFoundError(f"{beside} not found: an exported model carries its licence; run this in a clone")
    return Path(str(found[0].locate()))
