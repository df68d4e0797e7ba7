"""Stage `validate` checks the pairs, writes the report and the quarantine, and then stops or continues the pipeline."""

import pandas as pd

from onediff.config import load_params
from onediff.data.folders import folder_of, sources_of
from onediff.data.quality.checks import check_suite, judged, suites_of, write_report
from onediff.files import new_file
from onediff.paths import PROBE_TABLE, QUARANTINE, VALIDATION_REPORT
from onediff.stages.command import run


def validate() -> None:
    """Check all image pairs, write bad pairs to data/quarantine.parquet, and write data/reports/validation/.

    After both are written, ValueError is raised if there are too many bad pairs, if a fatal rule is broken, or if a
    published test set has bad pairs and data.partial does not list its source.
    """
    data = load_params().data
    if not PROBE_TABLE.exists():
        raise FileNotFoundError(f"{PROBE_TABLE} does not exist; 'dvc repro probe' writes it")
    table = pd.read_parquet(PROBE_TABLE)
    table = judged(table.assign(suite=suites_of(table, data)))
    checked = [check_suite(suite, table, tolerance=tolerance, partial=tuple(data.partial))
               for suite, tolerance in (("raw", data.tolerance.raw), ("generated", data.tolerance.generated))]
    with new_file(QUARANTINE) as path:
        pd.concat([suite.bad for suite in checked]).sort_index().to_parquet(path, index=False)
    write_report(checked, VALIDATION_REPORT, shard_folders=[folder_of(data, source) for source in sources_of(data)],
                 whole=tuple(source for source in data.raw if source not in data.partial))


if __name__ == "__main__":
    run(validate)
