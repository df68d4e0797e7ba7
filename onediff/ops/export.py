"""Export of a version as a folder that loads without the project and can be uploaded to the Hugging Face Hub."""

import shutil
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from onediff import registry
from onediff.files import new_folder
from onediff.ops import lineage

LICENCE = "LICENSE"


def export(version: str, folder: Path) -> Path:
    """Write model, processor, model card (README.md), licence and lineage.json of a registered version to a folder.

    The folder appears only when it is complete. Raises ValueError if the folder exists and is not empty, or if the
    registered files do not match their digest. Raises FileNotFoundError if the version has no model card.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} must be new or empty, but it contains files: choose another folder")
    number, uri = lineage.lineage_of(version)["version"], lineage.uri_of(version)
    carried, model = registry.version_files(uri), registry.model_folder(uri)
    if not (carried / "README.md").exists():
        raise FileNotFoundError(f"{carried / 'README.md'} does not exist, so version {number} has no model card: "
                                "register the model again")
    with new_folder(folder) as part:
        shutil.copytree(model, part, dirs_exist_ok=True)
        for path in (carried / "README.md", carried / lineage.FOLDER / "lineage.json", _licence()):
            shutil.copyfile(path, part / path.name)
        part.chmod(0o755)
    return folder


def _licence() -> Path:
    """Return the path of the licence file. In a clone it is beside the code, otherwise in the installed package."""
    in_clone = Path(__file__).parents[2] / LICENCE
    if in_clone.exists():
        return in_clone
    with suppress(PackageNotFoundError):
        for path in files("onediff-idc") or ():
            if path.name == LICENCE:
                return Path(str(path.locate()))
    raise FileNotFoundError(f"{in_clone} does not exist, and an exported model must contain the licence: run the "
                            "command in a clone")
