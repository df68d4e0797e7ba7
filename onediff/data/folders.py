"""The sources that params.yaml names, in the order in which DiffCap holds them, and where the records of each are."""

from pathlib import Path

from onediff.config import Data
from onediff.paths import PAIRS, SYNTHETIC, WRITTEN


def sources_of(data: Data) -> list[str]:
    return [*data.generated, *data.raw, *data.retrieved, *data.diffused]


def folder_of(data: Data, source: str) -> Path:
    """Where the last stage before `probe` writes the records of the source."""
    return (SYNTHETIC if source in data.generated else WRITTEN if source in data.written else PAIRS) / source
