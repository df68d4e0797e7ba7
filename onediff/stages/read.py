"""Stage `read`: a published set, or pairs of your own, from data/raw to records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tqdm import tqdm

from onediff.config import load_params, load_runtime
from onediff.data.folders import PAIRS
from onediff.data.record import write_shards
from onediff.data.sources.read import SHOWN, as_text, open_source, problems, records, survey
from onediff.data.splits import SPLITS
from onediff.files import new_folder, write_json
from onediff.stages.command import run

RAW, REPORTS = Path("data/raw"), Path("data/reports/read")


def read(source: str) -> None:
    """Writes data/pairs/<source>/<split>-*.parquet and report.json beside them.

    Raises ValueError if counts are not the official ones or images are missing and the source is not in data.partial;
    data/reports/read/<source>.json then names all of them.
    """
    config = load_params().data
    if source not in config.raw:
        raise ValueError(f"params.yaml: data.raw does not name '{source}'; it names {', '.join(config.raw) or 'none'}")
    partial = source in config.partial
    files = open_source(source, RAW / source, Path(load_runtime().scratch))
    summary = survey(source, files)
    num_pairs = summary.pop("written_splits")
    print(as_text(summary | {"missing": summary["missing"][:SHOWN]}))
    report = summary | {"partial": partial, "complete": not problems(summary)}
    if problems(summary) and not partial:
        _stop(source, report)
    (REPORTS / f"{source}.json").unlink(missing_ok=True)
    with new_folder(PAIRS / source) as folder:
        for split in SPLITS:
            if num_pairs.get(split):
                shown = tqdm(records(source, files, split), total=num_pairs[split], desc=f"{source} {split}",
                             unit="pair")
                write_shards(shown, folder, split, shard_pairs=config.shard_pairs)
        write_json(folder / "report.json", report, indent=1)


def _stop(source: str, report: dict[str, Any]) -> None:
    path = REPORTS / f"{source}.json"
    write_json(path, report, indent=1)
    first = f" (first: {report['missing'][0]})" if report["missing"] else ""
    raise ValueError(f"{RAW / source} is not as published: {'; '.join(problems(report))}{first}; {path} names all. "
                     f"Complete the download ('onediff data status'), or add {source} to data.partial in params.yaml")


if __name__ == "__main__":
    run(read)
