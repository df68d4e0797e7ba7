"""Raw data under DVC: what was imported from elsewhere and may have changed there, and what was added here."""

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
    """`dvc import-url` of every direct address into data/raw/<source>, in the project's folder; what is there stays.

    Raises ValueError for an unknown source, for one without a direct address (saying what to put where), and when DVC
    fails.
    """
    if source not in CATALOG:
        raise ValueError(f"source '{source}' is no published one; known are {', '.join(CATALOG)}")
    entry, folder = CATALOG[source], RAW / source
    if not entry.addresses:
        raise ValueError(f"{source} has no direct address: put into {folder}: {entry.manual} ({entry.home})")
    for place, address in entry.addresses.items():
        path = folder / place
        if path.exists():
            print(f"{path} is there")
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        if subprocess.run([*_DVC, "import-url", address, str(path)], check=False).returncode:
            raise ValueError(f"{path}: dvc could not get {address} (its words are above); try again, or put the file "
                             f"there yourself ({entry.home})")
    if entry.manual:
        print(f"still to do by hand, into {folder}: {entry.manual} ({entry.home})")


def imported() -> list[Path]:
    """The .dvc files of what `dvc import-url` or `dvc import` brought, as 'onediff data fetch' does; in order.

    Raises ValueError for a .dvc file that cannot be read.
    """
    return [path for path in sorted(RAW.rglob("*.dvc")) if path.is_file() and _read(path).get("deps")]


def update(path: Path) -> bool:
    """`dvc update` of one .dvc file; whether what it brought has other bytes now.

    Raises ValueError in DVC's words, such as when the origin cannot be reached; what is here stays as it is.
    """
    digests, content = _digests(path), path.read_bytes()
    try:
        _run("update", path)
    except ValueError as error:
        path.write_bytes(content)
        _run("checkout", path)  # DVC had removed what is here before it asked the origin
        raise ValueError(f"{error}; what is here stays: see whether its origin can be reached, then again") from None
    return _digests(path) != digests


def add(folder: Path) -> None:
    """`dvc add`. Raises ValueError in DVC's words."""
    _run("add", folder)


def state() -> str:
    """One digest over all .dvc files below data/raw: the same as long as the raw data are the same."""
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
        raise ValueError(f"{path}: not a .dvc file of DVC's; bring it back with 'git checkout {path}'")
    return content


def _run(verb: str, path: Path) -> None:
    """Runs `dvc <verb> <path>`, without --quiet, which would hide why it failed."""
    done = subprocess.run([*_DVC, verb, str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line.strip().removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.strip()]
        reason = " ".join(line for line in lines if not line.startswith("Having any troubles"))
        raise ValueError(f"dvc {verb} {path}: {reason or 'failed without a word'}")
