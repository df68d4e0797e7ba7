"""Stage `validate`: may the pairs be used? Report and quarantine first, then stop or go on."""

import pandas as pd

from onediff.config import load_params
from onediff.data.folders import folder_of, sources_of
from onediff.data.quality.checks import check_suite, judged, suites_of, write_report
from onediff.files import new_file
from onediff.paths import PROBE_TABLE, QUARANTINE, VALIDATION_REPORT
from onediff.stages.command import run


def validate() -> None:
    """Reads data/probe.parquet and the shards; writes data/quarantine.parquet and data/reports/validation/.

    Raises ValueError, after both are written, for too many bad pairs, a broken fatal rule, or a published test set that
    lost pairs while its source is not in data.partial.
    """
    data = load_params().data
    if not PROBE_TABLE.exists():
        raise FileNotFoundError(f"{PROBE_TABLE} not found: 'dvc repro probe' makes it")
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
