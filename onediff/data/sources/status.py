"""Reports for every source which files are present, which are missing and what to do, without reading any image."""

import os
from pathlib import Path
from typing import Any

from onediff.config import Config
from onediff.data.folders import sources_of
from onediff.data.sources.archives import ENDINGS
from onediff.data.sources.catalog import CATALOG, CatalogEntry
from onediff.data.sources.readers.folder import TABLES
from onediff.data.sources.readers.llava import only_json
from onediff.data.sources.tables import aligned
from onediff.files import read_json
from onediff.inputs.formats import IMAGE_ENDINGS
from onediff.paths import PAIRS, RAW, READ_REPORTS

_MAX_ENTRIES = 20_000  # largest number of directory entries that are listed per source
_OWN = CatalogEntry(what="pairs of your own", licence="yours", home="", size="", annotations=TABLES,
                    manual="pairs.csv, pairs.jsonl or one JSON file of LLaVA conversations, and its images "
                    "(data/README.md)")
_COLLECTION = CatalogEntry(what="captioned images of your own", licence="yours", home="", size="", annotations=(),
                           manual="images with their captions (data/README.md)")


def status(config: Config | None) -> list[dict[str, Any]]:
    """Return one row (a dict) for every published source and every source in the config.

    The row says which files are present, which are missing, and what to do next. Paths are relative to the project.
    """
    entries = dict(CATALOG)
    if config:
        entries |= {name: _OWN for name in config.data.raw if name not in CATALOG}
        entries |= dict.fromkeys((*config.data.retrieved, *config.data.diffused), _COLLECTION)
    used = sources_of(config.data) if config else []
    return [_row(source, entry) | {"used": source in used} for source, entry in entries.items()]


def as_text(rows: list[dict[str, Any]]) -> str:
    """Return the rows of `status` as text: a table, then the description and the next step of each source."""
    table = aligned(["source", "used", "size", "present", "missing"],
                    [[row["source"], "yes" if row["used"] else "no", row["size"] or "-", row["present"] or "nothing",
                      row["missing"] or "nothing"] for row in rows])
    parts = ["\n".join(line for line in (row["source"], f"  {row['what']}; licence: {row['licence']}",
                                         f"  {row['home']}".rstrip(), f"  to do: {row['todo']}") if line)
             for row in rows]
    return "\n\n".join([table, *parts])


def _row(source: str, entry: CatalogEntry) -> dict[str, Any]:
    folder = RAW / source
    names, archives, has_images = _listing(folder)
    annotated = [name for name in entry.annotations if name in names]
    if entry is _OWN and not annotated and (conversations := only_json(map(Path, names))):
        annotated = [conversations.name]
    needs_all = entry is not _OWN and source != "instruct_pix2pix"
    missing = []
    if not archives:  # If there are archives, they may contain the files that are not in the folder.
        missing += [name for name in entry.annotations if name not in names] if needs_all or not annotated else []
        missing += [] if has_images else ["images"]
    reports = [path for path in (READ_REPORTS / f"{source}.json", PAIRS / source / "report.json") if path.exists()]
    if reports:  # The last run of stage `read` or `retrieve` wrote a report; only that of `read` contains splits.
        splits = read_json(reports[0]).get("splits", {})
        num_missing = sum(counts["missing_images"] for counts in splits.values())
        missing += [f"{num_missing:,} images by name ({reports[0]})"] if num_missing else []
    steps = []
    if missing:
        present = [place for place in entry.addresses if (folder / place).exists() or Path(place).name in names]
        steps += [f"onediff data fetch {source}"] if len(present) < len(entry.addresses) else []
        steps += [f"put into {folder}: {entry.manual}"] if entry.manual else []
    return {"source": source, "what": entry.what, "licence": entry.licence, "home": entry.home, "size": entry.size,
            "present": ", ".join([*annotated, *archives, *(["images"] if has_images else [])]),
            "missing": ", ".join(missing),
            "todo": "; ".join(steps) or f"nothing; 'onediff data read {source} {folder}' counts the pairs"}


def _listing(folder: Path) -> tuple[set[str], list[str], bool]:
    """Return the names of files that are neither images nor archives, the archives, and whether there are images.

    The search stops after about _MAX_ENTRIES directory entries.
    """
    names, archives, has_images, num_entries = set(), [], False, 0
    for path, below, files in os.walk(folder, followlinks=True):
        below.sort()
        for name in sorted(files):
            ending = os.path.splitext(name)[1].lower()
            has_images |= ending in (*IMAGE_ENDINGS, ".parquet")
            if name.lower().endswith(ENDINGS):
                archives.append(os.path.relpath(os.path.join(path, name), folder))
            elif ending not in IMAGE_ENDINGS:
                names.add(name)
        num_entries += len(files) + len(below)
        if num_entries > _MAX_ENTRIES:
            break
    return names, archives, has_images
