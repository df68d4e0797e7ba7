"""A source's reader, what it finds in a folder as published, and the records that come of it."""

from __future__ import annotations

import difflib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from onediff.config import load_runtime
from onediff.data.record import Record
from onediff.data.sources.catalog import CATALOG, READERS
from onediff.data.sources.file_index import Files, open_files
from onediff.data.sources.published import PublishedPair, split_of, to_record
from onediff.data.sources.readers import folder as own
from onediff.data.sources.tables import aligned

SHOWN = 20  # missing images that are printed
SHARED = (("test", "val"), ("train", "val"), ("train", "test"))
COUNTS = ("records", "pairs", "references", "empty", "missing_images")


def reader_of(source: str, files: Files) -> Callable[[Files], Iterator[PublishedPair]]:
    """That of the published set so called, else `folder`. Raises ValueError for a name that looks misspelt."""
    if source in READERS:
        return READERS[source]
    if any(map(files.named, own.TABLES)):
        return own.read
    near = difflib.get_close_matches(source, READERS, 1)
    hint = f"did you mean '{near[0]}'?" if near else f"published ones are {', '.join(READERS)}"
    raise ValueError(f"source '{source}' is no published one ({hint}) and the folder has no "
                     f"{' or '.join(own.TABLES)}: data/README.md shows how to write one")


def open_source(source: str, folder: Path, scratch: Path) -> Files:
    """Raises FileNotFoundError that says what to put there; ValueError for an archive that is broken or not safe."""
    if not folder.is_dir() and source in CATALOG:
        entry = CATALOG[source]
        steps = [f"run 'onediff data fetch {source}'"] if entry.addresses else []
        steps += [f"put there {entry.manual}"] if entry.manual else []
        raise FileNotFoundError(f"{folder} not found: {', then '.join(steps)} ({entry.home})")
    return open_files(folder, scratch)


def records(source: str, files: Files, split: str) -> Iterator[Record]:
    """The split's records, images read as they are asked for."""
    for pair in reader_of(source, files)(files):
        if split_of(source, pair) == split:
            yield to_record(source, pair, files)


def summarize(source: str, folder: Path, *, scratch: Path | None = None) -> dict[str, Any]:
    """Counts by official split, image pairs that splits share, and the first missing images.

    Archives in the folder are unpacked below `scratch` (by default runtime.yaml's), once. Raises ValueError,
    FileNotFoundError.
    """
    summary = survey(source, open_source(source, folder, scratch or Path(load_runtime().scratch)))
    del summary["written_splits"]
    return summary | {"missing": summary["missing"][:SHOWN]}


def survey(source: str, files: Files) -> dict[str, Any]:
    """As `summarize`, with every missing image and, under `written_splits`, how many pairs go into which split."""
    tally: dict[str, Counter[str]] = defaultdict(Counter)
    types: dict[str, Counter[str]] = defaultdict(Counter)
    names: dict[str, set[int]] = defaultdict(set)  # by hash: there may be millions
    missing: dict[str, dict[str, None]] = defaultdict(dict)
    written: Counter[str] = Counter()
    for pair in reader_of(source, files)(files):
        split, count = pair.official_split, tally[pair.official_split]
        written[split_of(source, pair)] += 1
        types[split][pair.change_type] += 1
        count.update(records=pair.num_records, references=len(pair.references), empty=pair.num_empty,
                     unreferenced=int(not pair.references))
        if len(pair.names) == 2:
            names[split].add(hash(pair.names))
        lacking = {name: None for name, path in zip(pair.names, pair.locate(files), strict=True) if not path}
        missing[split] |= lacking
        count["missing_pairs"] += bool(lacking)
    splits: dict[str, dict[str, Any]] = {
        split: _counted(source, split, tally[split], len(names[split]), len(missing[split]))
        for split in ("train", "val", "gate", "test") if split in tally or split in _expected(source)
    }
    for split, counts in types.items():
        splits[split]["types"] = dict(sorted(counts.items()))
    shared = {f"{one}-{other}": len(names[one] & names[other]) for one, other in SHARED}
    every = list(dict.fromkeys(name for split in splits for name in missing[split]))
    return {"source": source, "splits": splits, "shared": shared, "missing": every,
            "notes": list(_notes(source, splits)), "written_splits": dict(written)}


def as_text(summary: dict[str, Any]) -> str:
    """The summary as lines to print."""
    rows = [[split, *(f"{counts[name]:,}" for name in COUNTS), _verdict(counts)]
            for split, counts in summary["splits"].items()]
    lines = [summary["source"], aligned(["split", *(name.replace("_", " ") for name in COUNTS), ""], rows)]
    both = [f"{splits} {number:,}" for splits, number in summary["shared"].items()]
    lines.append(f"image pairs shared between splits, by published name: {', '.join(both)}")
    if summary["missing"]:
        total = sum(counts["missing_images"] for counts in summary["splits"].values())
        more = f" and on ({total:,} in all)" if total > len(summary["missing"]) else ""
        lines.append(f"missing: {', '.join(summary['missing'])}{more}")
    return "\n".join([*lines, *summary["notes"]])


def problems(summary: dict[str, Any]) -> list[str]:
    """One line for every split that is not as published."""
    found = []
    for split, counts in summary["splits"].items():
        wrong = [f"{counts[name]:,} {name} where {number:,} are published"
                 for name, number in (counts["expected"] or {}).items() if counts[name] != number]
        if counts["missing_images"]:
            images = "image" if counts["missing_images"] == 1 else "images"
            wrong.append(f"{counts['missing_images']:,} {images} missing")
        if wrong:
            found.append(f"{split}: {', '.join(wrong)}")
    return found


def _expected(source: str) -> dict[str, dict[str, int]]:
    return CATALOG[source].expected if source in CATALOG else {}


def _counted(source: str, split: str, tally: Counter[str], num_pairs: int, num_missing: int) -> dict[str, Any]:
    expected = _expected(source).get(split)
    counts: dict[str, Any] = {"records": tally["records"], "pairs": num_pairs, "references": tally["references"],
                              "empty": tally["empty"], "missing_images": num_missing,
                              "missing_pairs": tally["missing_pairs"], "unreferenced": tally["unreferenced"]}
    with_empty = tally["references"] + tally["empty"]
    if expected and expected.get("references") == with_empty:
        counts["references"] = with_empty  # the official figure counts every sentence, empty ones too
    same = all(counts[name] == number for name, number in (expected or {}).items())
    return counts | {"expected": expected, "complete": same and not num_missing and tally["records"] > 0}


def _verdict(counts: dict[str, Any]) -> str:
    if counts["complete"]:
        return "complete" if counts["expected"] else "no image missing"
    wrong = [f"{name} {number:,}" for name, number in (counts["expected"] or {}).items() if counts[name] != number]
    return f"published: {', '.join(wrong)}" if wrong else "images missing"


def _notes(source: str, splits: dict[str, dict[str, Any]]) -> Iterator[str]:
    for split, counts in splits.items():
        if not counts["records"]:
            yield f"{split}: nothing found ({', '.join(CATALOG[source].annotations)} belong into the folder)"
        if counts["unreferenced"] and (counts["references"] or split == "test"):
            yield f"{split}: {counts['unreferenced']:,} pairs have no sentence, or empty ones only: none can score them"
    if source in CATALOG and not CATALOG[source].expected:
        yield "no official counts are known: only the format was checked"
