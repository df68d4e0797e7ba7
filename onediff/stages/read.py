"""Stage `read`: a published set, or pairs of your own, from data/raw to records."""

from pathlib import Path

from tqdm import tqdm

from onediff.config import load_params, load_runtime
from onediff.data.record import SPLITS, write_shards
from onediff.data.sources.read import SHOWN, as_text, open_source, problems, records, survey
from onediff.files import new_folder, write_json
from onediff.paths import PAIRS, RAW, READ_REPORTS
from onediff.stages.command import run


def read(source: str) -> None:
    """Writes data/pairs/<source>/<split>-*.parquet and report.json beside them.

    Raises ValueError if counts are not the official ones or images are missing and the source is not in data.partial;
    data/reports/read/<source>.json then names all of them.
    """
    config = load_params().data
    if source not in config.raw:
        raise ValueError(f"params.yaml: data.raw does not name '{source}'; it names {', '.join(config.raw) or 'none'}")
    files = open_source(source, RAW / source, Path(load_runtime().scratch))
    summary, num_pairs = survey(source, files)
    missing, wrong = summary["missing"], problems(summary)
    print(as_text(summary | {"missing": missing[:SHOWN]}))
    report = summary | {"partial": source in config.partial, "complete": not wrong}
    report_path = READ_REPORTS / f"{source}.json"
    if wrong and source not in config.partial:
        write_json(report_path, report, indent=1)
        first = f" (first: {missing[0]})" if missing else ""
        raise ValueError(f"{RAW / source} is not as published: {'; '.join(wrong)}{first}; {report_path} names all. "
                         f"Complete the download ('onediff data status'), or add {source} to data.partial in "
                         "params.yaml")
    report_path.unlink(missing_ok=True)
    with new_folder(PAIRS / source) as folder:
        for split in filter(num_pairs.get, SPLITS):
            shown = tqdm(records(source, files, split), f"{source} {split}", num_pairs[split], unit="pair")
            write_shards(shown, folder, split, shard_pairs=config.shard_pairs)
        write_json(folder / "report.json", report, indent=1)


if __name__ == "__main__":
    run(read)
