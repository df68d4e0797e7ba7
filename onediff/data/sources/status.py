"""What is there of every source, what is not, and what to do; without reading any image."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from onediff.config import Config
from onediff.data.folders import sources_of
from onediff.data.sources.archives import ENDINGS
from onediff.data.sources.catalog import CATALOG, CatalogEntry
from onediff.data.sources.file_index import IMAGE_ENDINGS
from onediff.data.sources.readers.folder import TABLES
from onediff.data.sources.tables import aligned

RAW, PAIRS = Path("data/raw"), Path("data/pairs")
_LOOKED_AT = 20_000  # directory entries per source
_OWN = CatalogEntry(what="pairs of your own", licence="yours", home="", size="", annotations=TABLES,
                    manual="pairs.csv or pairs.jsonl and its images (data/README.md)")
_COLLECTION = CatalogEntry(what="captioned images of your own", licence="yours", home="", size="", annotations=(),
                           manual="images with their captions (data/README.md)")


def status(config: Config | None) -> list[dict[str, Any]]:
    """A row for every published source and for each that the config names; paths are relative to the project."""
    entries = dict(CATALOG)
    if config:
        entries |= {name: _OWN for name in config.data.raw if name not in CATALOG}
        entries |= dict.fromkeys((*config.data.retrieved, *config.data.diffused), _COLLECTION)
    return [_row(source, entry, config) for source, entry in entries.items()]


def as_text(rows: list[dict[str, Any]]) -> str:
    """The table, then what each source is and what to do for it."""
    table = aligned(["source", "used", "size", "present", "missing"],
                    [[row["source"], "yes" if row["used"] else "no", row["size"] or "-", row["present"] or "nothing",
                      row["missing"] or "nothing"] for row in rows])
    parts = [table]
    for row in rows:
        about = f"{row['what']}; licence: {row['licence']}"
        parts.append("\n".join(line for line in (row["source"], f"  {about}", f"  {row['home']}".rstrip(),
                                                 f"  to do: {row['todo']}") if line))
    return "\n\n".join(parts)


def _row(source: str, entry: CatalogEntry, config: Config | None) -> dict[str, Any]:
    folder = RAW / source
    found = _look(folder)
    annotated = [name for name in entry.annotations if name in found["names"]]
    needs_all = entry is not _OWN and source != "instruct_pix2pix"
    absent = [name for name in entry.annotations if name not in annotated] if needs_all or not annotated else []
    present = [*annotated, *found["archives"]] + (["images"] if found["images"] else [])
    missing = absent if not found["archives"] else []  # they may be in the archive
    if not found["images"] and not found["archives"]:
        missing = [*missing, "images"]
    missing += _known_missing(source)
    return {"source": source, "what": entry.what, "licence": entry.licence, "home": entry.home, "size": entry.size,
            "present": ", ".join(present), "missing": ", ".join(missing),
            "todo": _todo(source, entry, folder, missing, found["names"]),
            "used": bool(config and source in sources_of(config.data))}


def _look(folder: Path) -> dict[str, Any]:
    """Names of files that are no images, the archives, whether there is an image; after some thousand it stops."""
    names, archives, images, looked = set(), [], False, 0
    for path, below, files in os.walk(folder, followlinks=True):
        below.sort()
        for name in sorted(files):
            ending = os.path.splitext(name)[1].lower()
            images |= ending in IMAGE_ENDINGS or ending == ".parquet"
            if name.lower().endswith(ENDINGS):
                archives.append(os.path.relpath(os.path.join(path, name), folder))
            elif ending not in IMAGE_ENDINGS:
                names.add(name)
        looked += len(files) + len(below)
        if looked > _LOOKED_AT:
            break
    return {"names": names, "archives": archives, "images": images}


def _known_missing(source: str) -> list[str]:
    """What stage read found to be missing when it last ran."""
    for path in (Path("data/reports/read") / f"{source}.json", PAIRS / source / "report.json"):
        if path.exists():
            splits = json.loads(path.read_text(encoding="utf-8"))["splits"].values()
            missing = sum(counts["missing_images"] for counts in splits)
            return [f"{missing:,} images by name ({path})"] if missing else []
    return []


def _todo(source: str, entry: CatalogEntry, folder: Path, missing: list[str], names: set[str]) -> str:
    steps = []
    if missing:
        there = [place for place in entry.addresses if (folder / place).exists() or Path(place).name in names]
        steps += [f"onediff data fetch {source}"] if len(there) < len(entry.addresses) else []
        steps += [f"put into {folder}: {entry.manual}"] if entry.manual else []
    return "; ".join(steps) or f"nothing; 'onediff data read {source} {folder}' counts what is there"
