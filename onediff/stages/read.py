"""Stage `read` turns a published dataset, or the user's own pairs, from data/raw into records."""

from pathlib import Path

from tqdm import tqdm

from onediff.config import load_params, load_runtime
from onediff.data.record import SPLITS, write_shards
from onediff.data.sources.read import SHOWN, as_text, open_source, problems, records, survey
from onediff.files import new_folder, write_json
from onediff.paths import PAIRS, RAW, READ_REPORTS
from onediff.stages.command import run


def read(source: str) -> None:
    """Convert the dataset in data/raw/SOURCE to data/pairs/SOURCE/SPLIT-*.parquet, with report.json beside these files.

    Unless data.partial lists the source, ValueError is raised if images are missing, or if the number of pairs differs
    from that of the published dataset. data/reports/read/SOURCE.json then lists every problem.
    """
    config = load_params().data
    if source not in config.raw:
        raise ValueError(f"params.yaml: data.raw must list '{source}', but lists {', '.join(config.raw) or 'nothing'}")
    files = open_source(source, RAW / source, Path(load_runtime().scratch))
    summary, num_pairs = survey(source, files)
    missing, wrong = summary["missing"], problems(summary)
    print(as_text(summary | {"missing": missing[:SHOWN]}))
    report = summary | {"partial": source in config.partial, "complete": not wrong}
    report_path = READ_REPORTS / f"{source}.json"
    if wrong and source not in config.partial:
        write_json(report_path, report, indent=1)
        first = f" (first: {missing[0]})" if missing else ""
        raise ValueError(f"{RAW / source} differs from the published dataset: {'; '.join(wrong)}{first}; {report_path} "
                         f"lists everything. Complete the download ('onediff data status'), or add {source} to "
                         "data.partial in params.yaml")
    report_path.unlink(missing_ok=True)
    with new_folder(PAIRS / source) as folder:
        for split in filter(num_pairs.get, SPLITS):
            shown = tqdm(records(source, files, split), f"{source} {split}", num_pairs[split], unit="pair")
            write_shards(shown, folder, split, shard_pairs=config.shard_pairs)
        write_json(folder / "report.json", report, indent=1)


if __name__ == "__main__":
    run(read)
