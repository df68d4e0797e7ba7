"""Lists the data sources of params.yaml in the order in which DiffCap stores them, and the folder of each source."""

from pathlib import Path

from onediff.config import Data
from onediff.paths import PAIRS, SYNTHETIC, WRITTEN


def sources_of(data: Data) -> list[str]:
    """Return the names of all sources in params.yaml: first generated, then raw, retrieved and diffused sources."""
    return [*data.generated, *data.raw, *data.retrieved, *data.diffused]


def folder_of(data: Data, source: str) -> Path:
    """Return the folder of the source's finished records, which the DVC stage `probe` reads."""
    return (SYNTHETIC if source in data.generated else WRITTEN if source in data.written else PAIRS) / source
