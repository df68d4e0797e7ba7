"""Reads a source: chooses the reader, counts what a folder contains, and yields the records."""

import difflib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from onediff.config import load_runtime
from onediff.data.record import SPLITS, Record
from onediff.data.sources.catalog import CATALOG
from onediff.data.sources.published import Files, PublishedPair, open_files, split_of, to_record
from onediff.data.sources.readers import folder as own
from onediff.data.sources.readers import llava
from onediff.data.sources.tables import aligned

SHOWN = 20  # largest number of missing or broken images that are printed
SHARED = (("test", "val"), ("train", "val"), ("train", "test"))
COUNTS = ("records", "pairs", "references", "empty", "missing_images")


def reader_of(source: str, files: Files) -> Callable[[Files], Iterator[PublishedPair]]:
    """Return the function that yields the pairs of a source.

    A published data set has a reader of its own; every other source needs a table of users' own pairs, or one JSON file
    with conversations in the format of LLaVA. Raises ValueError if the source is not a published data set and `files`
    contains neither.
    """
    if source in CATALOG:
        return CATALOG[source].read
    if any(map(files.named, own.TABLES)):
        return own.read
    if llava.only_json(files.ending(".json")):
        return llava.read_665k
    near = difflib.get_close_matches(source, CATALOG, 1)
    hint = f"did you mean '{near[0]}'?" if near else f"the published sets are {', '.join(CATALOG)}"
    raise ValueError(f"source '{source}' is not a published set ({hint}), and the folder does not contain "
                     f"{' or '.join(own.TABLES)}, or one JSON file of LLaVA conversations: data/README.md shows how to "
                     "write such a file")


def open_source(source: str, folder: Path, scratch: Path) -> Files:
    """Return an index of all files in the folder of a source. Archives in the folder are unpacked below `scratch`.

    Raises FileNotFoundError, with instructions how to get the files, if the folder does not exist. Raises ValueError if
    an archive is broken or not safe to unpack.
    """
    if not folder.is_dir() and source in CATALOG:
        entry = CATALOG[source]
        steps = [f"run 'onediff data fetch {source}'"] if entry.addresses else []
        steps += [f"put into this folder: {entry.manual}"] if entry.manual else []
        raise FileNotFoundError(f"{folder} does not exist: {', then '.join(steps)} (home page: {entry.home})")
    return open_files(folder, scratch)


def records(source: str, files: Files, split: str) -> Iterator[Record]:
    """Yield the records of one split of the source; the images of a record are read only when the record is needed."""
    return (to_record(source, pair, files) for pair in reader_of(source, files)(files)
            if split_of(source, pair) == split)


def summarize(source: str, folder: Path, *, scratch: Path | None = None) -> dict[str, Any]:
    """Return a dict with the counts of records, pairs, references and missing images in each published split.

    The dict also contains the number of image pairs that two splits share, and the names of the first missing images.
    Archives in `folder` are unpacked once below `scratch` (default: the folder `scratch` of runtime.yaml). Raises
    ValueError or FileNotFoundError if an annotation file is broken or missing.
    """
    summary, _ = survey(source, open_source(source, folder, scratch or Path(load_runtime().scratch)))
    return summary | {"missing": summary["missing"][:SHOWN]}


def survey(source: str, files: Files) -> tuple[dict[str, Any], Counter[str]]:
    """Return (summary, number of pairs in each DiffCap split) of a source.

    The summary is the dict that `summarize` returns, but with the names of all missing images.
    """
    tally: dict[str, Counter[str]] = defaultdict(Counter)
    types: dict[str, Counter[str]] = defaultdict(Counter)
    names: dict[str, set[int]] = defaultdict(set)  # split -> hashes of image names, which need less memory than names
    missing: dict[str, dict[str, None]] = defaultdict(dict)
    num_pairs: Counter[str] = Counter()
    read = reader_of(source, files)
    for pair in read(files):
        split = pair.official_split
        num_pairs[split_of(source, pair)] += 1
        types[split][pair.change_type] += 1
        absent = {name: None for name, path in zip(pair.names, pair.locate(files), strict=True) if not path}
        missing[split] |= absent
        names[split] |= {hash(pair.names)} if len(pair.names) == 2 else set()
        tally[split].update(records=pair.num_records, references=len(pair.references), empty=pair.num_empty,
                            unreferenced=int(not pair.references), missing_pairs=int(bool(absent)))
    expected = CATALOG[source].expected if source in CATALOG else {}
    splits: dict[str, dict[str, Any]] = {}
    for split in SPLITS:
        if split in tally or split in expected:
            splits[split] = _counted(expected.get(split), tally[split], len(names[split]), len(missing[split]))
            splits[split] |= {"types": dict(sorted(types[split].items()))} if split in types else {}
    shared = {f"{one}-{other}": len(names[one] & names[other]) for one, other in SHARED}
    every = list(dict.fromkeys(name for split in splits for name in missing[split]))
    return {"source": source, "splits": splits, "shared": shared, "missing": every,
            "notes": [*_notes(source, splits), *(_own_notes(tally, num_pairs) if read is own.read else ())]}, num_pairs


def as_text(summary: dict[str, Any]) -> str:
    """Convert the summary that `summarize` returns to text for the terminal."""
    rows = [[split, *(f"{counts[name]:,}" for name in COUNTS), _verdict(counts)]
            for split, counts in summary["splits"].items()]
    lines = [summary["source"], aligned(["split", *(name.replace("_", " ") for name in COUNTS), ""], rows)]
    shared = [f"{splits} {number:,}" for splits, number in summary["shared"].items()]
    lines.append(f"image pairs shared between splits, by published name: {', '.join(shared)}")
    if summary["missing"]:
        total = sum(counts["missing_images"] for counts in summary["splits"].values())
        more = f" and more ({total:,} in total)" if total > len(summary["missing"]) else ""
        lines.append(f"missing: {', '.join(summary['missing'])}{more}")
    for kind in ("broken", "noted"):
        messages = summary.get(kind, [])
        more = f"; and {len(messages) - SHOWN:,} more" if len(messages) > SHOWN else ""
        lines += [f"{kind}: {'; '.join(messages[:SHOWN])}{more}"] if messages else []
    return "\n".join([*lines, *summary["notes"]])


def problems(summary: dict[str, Any]) -> list[str]:
    """Return one line for every split whose counts differ from the published counts, or whose images are missing."""
    lines = []
    for split, counts in summary["splits"].items():
        wrong = [f"{counts[name]:,} {name}, but {number:,} were published" for name, number in _wrong(counts)]
        if counts["missing_images"]:
            noun = "image" if counts["missing_images"] == 1 else "images"
            wrong.append(f"{counts['missing_images']:,} {noun} missing")
        if wrong:
            lines.append(f"{split}: {', '.join(wrong)}")
    return lines


def _wrong(counts: dict[str, Any]) -> list[tuple[str, int]]:
    """Return (name, published value) for each count of the split that differs from the published value."""
    return [(name, number) for name, number in (counts["expected"] or {}).items() if counts[name] != number]


def _counted(expected: dict[str, int] | None, tally: Counter[str], num_pairs: int, num_missing: int) -> dict[str, Any]:
    # If the published number of references includes empty sentences, we count empty sentences too.
    with_empty = tally["references"] + tally["empty"]
    official = expected and expected.get("references") == with_empty
    counts: dict[str, Any] = {"records": tally["records"], "pairs": num_pairs,
                              "references": with_empty if official else tally["references"], "empty": tally["empty"],
                              "missing_images": num_missing, "missing_pairs": tally["missing_pairs"],
                              "unreferenced": tally["unreferenced"], "expected": expected}
    return counts | {"complete": not _wrong(counts) and not num_missing and tally["records"] > 0}


def _verdict(counts: dict[str, Any]) -> str:
    if counts["complete"]:
        return "complete" if counts["expected"] else "no image missing"
    wrong = [f"{name} {number:,}" for name, number in _wrong(counts)]
    return f"published: {', '.join(wrong)}" if wrong else "images missing"


def _own_notes(tally: dict[str, Counter[str]], num_pairs: Counter[str]) -> Iterator[str]:
    """Yield what users should know about a table of their own pairs: merged rows, and why it has no score."""
    for split in SPLITS:
        merged = tally[split]["records"] - num_pairs[split] if split in tally else 0
        if merged:
            rows = "1 row was" if merged == 1 else f"{merged:,} rows were"
            yield f"{split}: {rows} merged into the pair with equal images and an equal instruction"
    if not num_pairs["test"]:
        yield ("no pair is in split test, so this source gets no score: write test into the column split of some rows, "
               "or add pairs")


def _notes(source: str, splits: dict[str, dict[str, Any]]) -> Iterator[str]:
    for split, counts in splits.items():
        if not counts["records"]:
            yield f"{split}: no records (the folder must contain {', '.join(CATALOG[source].annotations)})"
        if counts["unreferenced"] and (counts["references"] or split == "test"):
            yield f"{split}: {counts['unreferenced']:,} pairs have no reference with words and cannot be scored"
    if source in CATALOG and not CATALOG[source].expected:
        yield "the official counts are unknown, so only the format was checked"
