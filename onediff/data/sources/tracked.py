"""Raw data under DVC: what was imported from elsewhere and may have changed there, and what was added here."""

from __future__ import annotations

import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

RAW = Path("data/raw")


def imported(root: Path = RAW) -> list[Path]:
    """The .dvc files of what `dvc import-url` or `dvc import` brought, as 'onediff data fetch' does; in order.

    Raises ValueError for a .dvc file that cannot be read.
    """
    return [path for path in sorted(root.rglob("*.dvc")) if path.is_file() and _read(path).get("deps")]


def update(path: Path) -> bool:
    """`dvc update` of one .dvc file; whether what it brought has other bytes now.

    Raises ValueError in DVC's words, such as when the origin cannot be reached; what is here stays as it is.
    """
    before, kept = _digests(path), path.read_bytes()
    try:
        _dvc("update", str(path))
    except ValueError as error:
        path.write_bytes(kept)
        _dvc("checkout", str(path))  # DVC had removed what is here before it asked the origin
        raise ValueError(f"{error}; what is here stays: see whether its origin can be reached, then again") from None
    return _digests(path) != before


def add(folder: Path) -> None:
    """`dvc add`. Raises ValueError in DVC's words."""
    _dvc("add", str(folder))


def state(root: Path = RAW) -> str:
    """One digest over all .dvc files below: the same as long as the raw data are the same."""
    total = sha256()
    for path in sorted(root.rglob("*.dvc")):
        total.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return total.hexdigest()[:32]


def _digests(path: Path) -> list[Any]:
    return [out.get("md5") or out.get("etag") for out in _read(path).get("outs") or []]


def _read(path: Path) -> dict[str, Any]:
    try:
        found = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    except (YAMLError, UnicodeDecodeError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: not a .dvc file of DVC's; bring it back with 'git checkout {path}'")
    return found


def _dvc(*arguments: str) -> None:
    command = [sys.executable, "-m", "dvc", *arguments]  # --quiet would hide why it failed
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        words = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        said = " ".join(line.removeprefix("ERROR: ") for line in words if not line.startswith("Having any troubles"))
        raise ValueError(f"dvc {arguments[0]} {arguments[1]}: {said or 'failed without a word'}")
