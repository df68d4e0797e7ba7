"""Writes a version as a folder that loads without this project's data and can be uploaded to a hub."""

import shutil
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from onediff import registry
from onediff.files import new_folder
from onediff.ops import lineage

LICENCE = "LICENSE"


def export(version: str, folder: Path) -> Path:
    """Writes model, processor, README.md (the model card), licence and lineage.json. The folder is complete or absent.

    Raises ValueError if the folder exists and is not empty, or the registered files are not those of their digest;
    FileNotFoundError if the version carries no model card.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there and not empty: name a new folder")
    number, uri = lineage.lineage_of(version)["version"], lineage.uri_of(version)
    carried, model = registry.version_files(uri), registry.model_folder(uri)
    if not (carried / "README.md").exists():
        raise FileNotFoundError(f"{carried / 'README.md'} not found: version {number} has no model card; "
                                "register it again")
    with new_folder(folder) as part:
        shutil.copytree(model, part, dirs_exist_ok=True)
        for path in (carried / "README.md", carried / lineage.FOLDER / "lineage.json", _licence()):
            shutil.copyfile(path, part / path.name)
        part.chmod(0o755)
    return folder


def _licence() -> Path:
    """The licence beside the code of a clone, or of the installed distribution."""
    in_clone = Path(__file__).parents[2] / LICENCE
    if in_clone.exists():
        return in_clone
    with suppress(PackageNotFoundError):
        for path in files("onediff-idc") or ():
            if path.name == LICENCE:
                return Path(str(path.locate()))
    raise FileNotFoundError(f"{in_clone} not found: an exported model carries its licence; run this in a clone")
