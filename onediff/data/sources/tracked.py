"""Keeps raw data under DVC: imports and updates published files, and adds folders of users' own data."""

import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from onediff.data.sources.catalog import CATALOG
from onediff.paths import RAW

_DVC = (sys.executable, "-m", "dvc")


def fetch(source: str) -> None:
    """Download the files of a published source that do not exist yet into data/raw/<source>, with `dvc import-url`.

    Raises ValueError if the source is unknown, if it has no download addresses (the message then explains how to get
    the files), or if DVC fails.
    """
    if source not in CATALOG:
        raise ValueError(f"source '{source}' is not a published set; the published sets are {', '.join(CATALOG)}")
    entry, folder = CATALOG[source], RAW / source
    if not entry.addresses:
        raise ValueError(f"{source} cannot be downloaded automatically: put into {folder}: {entry.manual} "
                         f"(home page: {entry.home})")
    for place, address in entry.addresses.items():
        path = folder / place
        if path.exists():
            print(f"{path} already exists")
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        if subprocess.run([*_DVC, "import-url", address, str(path)], check=False).returncode:
            raise ValueError(f"{path}: dvc could not download {address} (see the error above); try again, or put the "
                             f"file there by hand (home page: {entry.home})")
    if entry.manual:
        print(f"now put by hand into {folder}: {entry.manual} ({entry.home})")


def imported() -> list[Path]:
    """Return the .dvc files below data/raw that `dvc import-url` or `dvc import` has written, in order.

    Raises ValueError if a .dvc file cannot be read.
    """
    return [path for path in sorted(RAW.rglob("*.dvc")) if path.is_file() and _read(path).get("deps")]


def update(path: Path) -> bool:
    """Run `dvc update` on one .dvc file and return whether the data that belong to this file changed.

    If the update fails, for example because the download address cannot be reached, the local data are restored, and
    ValueError with DVC's message is raised.
    """
    digests, content = _digests(path), path.read_bytes()
    try:
        _run("update", path)
    except ValueError as error:
        path.write_bytes(content)
        _run("checkout", path)  # `dvc update` removes the local data before it contacts the download address.
        raise ValueError(f"{error}; the local data are unchanged: check the connection to the download address, then "
                         "try again") from None
    return _digests(path) != digests


def add(folder: Path) -> None:
    """Run `dvc add` on the folder. Raises ValueError with DVC's message if the command fails."""
    _run("add", folder)


def state() -> str:
    """Return one digest of all .dvc files below data/raw; it changes only when a file of the raw data changes."""
    contents = (f"{path.relative_to(RAW)}\0".encode() + path.read_bytes() for path in sorted(RAW.rglob("*.dvc")))
    return sha256(b"".join(contents)).hexdigest()[:32]


def _digests(path: Path) -> list[Any]:
    return [out.get("md5") or out.get("etag") for out in _read(path).get("outs") or []]


def _read(path: Path) -> dict[str, Any]:
    try:
        content = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    except (YAMLError, UnicodeDecodeError):
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must be a .dvc file written by DVC; restore the file with 'git checkout {path}'")
    return content


def _run(verb: str, path: Path) -> None:
    """Run `dvc <verb> <path>`. We do not pass --quiet, because this option would hide why DVC failed."""
    done = subprocess.run([*_DVC, verb, str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line.strip().removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.strip()]
        reason = " ".join(line for line in lines if not line.startswith("Having any troubles"))
        raise ValueError(f"dvc {verb} {path}: {reason or 'failed without a message'}")
