"""Published files by DVC from their direct addresses, so that their origin and digest are known."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from onediff.data.sources.catalog import CATALOG


def fetch(source: str) -> None:
    """`dvc import-url` of every direct address into data/raw/<source>, in the project's folder; what is there stays.

    Raises ValueError for an unknown source, for one without a direct address (saying what to put where), and when DVC
    fails.
    """
    if source not in CATALOG:
        raise ValueError(f"source '{source}' is no published one; known are {', '.join(CATALOG)}")
    entry, folder = CATALOG[source], Path("data/raw") / source
    if not entry.addresses:
        raise ValueError(f"{source} has no direct address: put into {folder}: {entry.manual} ({entry.home})")
    for place, address in entry.addresses.items():
        path = folder / place
        if path.exists():
            print(f"{path} is there")
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "dvc", "import-url", address, str(path)]
        if subprocess.run(command, check=False).returncode:
            raise ValueError(f"{path}: dvc could not get {address} (its words are above); try again, or put the file "
                             f"there yourself ({entry.home})")
    if entry.manual:
        print(f"still to do by hand, into {folder}: {entry.manual} ({entry.home})")
