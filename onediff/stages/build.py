"""Stage `build` selects the good pairs of all sources and writes them as DiffCap shards with a dataset card."""

import functools
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from onediff.config import Config, load_params, load_runtime
from onediff.data.folders import folder_of, sources_of
from onediff.data.overlap.verdicts import verdicts
from onediff.data.quality.checks import check_suite, judged, write_report
from onediff.data.quality.diffcap import (
    card,
    chosen_tables,
    dataset_card,
    good_rows,
    incomplete_tests,
    leak_card,
    staying,
)
from onediff.data.quality.leaks import find_leaks, near_train_images, read_thumbnails, refuse_leaks, shared_names
from onediff.data.quality.shortcut import pixel_difference_auc
from onediff.data.record import SPLITS, Record, read_records, write_tables
from onediff.data.sources.catalog import CATALOG
from onediff.files import new_file, new_folder, read_json, write_json, write_text
from onediff.paths import DIFFCAP, DIFFCAP_REPORTS, PAIRS, PROBE_TABLE, QUARANTINE
from onediff.stages.command import run

LEAKS = DIFFCAP_REPORTS / "leaks.parquet"
# The audit is not in the data card, because a change of the card makes training stale and the audit must not do so.
AUDIT = DIFFCAP_REPORTS / "audit.json"
AUC_PAIRS = 3000  # largest number of pairs per split from which the pixel_difference_auc is computed


def build() -> None:
    """Write the image pairs that passed validation and do not leak between splits to data/diffcap/.

    Reports are written to data/reports/diffcap/. After that, ValueError is raised if the selected pairs break a rule
    of the data checks, or if pairs leak between splits and data.leaks.action is `stop`.
    """
    config = load_params()
    for path in (PROBE_TABLE, QUARANTINE):
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist; 'dvc repro validate' writes it")
    probed, bad = pd.read_parquet(PROBE_TABLE), pd.read_parquet(QUARANTINE)
    good = good_rows(probed, quarantined=frozenset(bad["pair_id"]))
    folders = [folder_of(config.data, source) for source in sources_of(config.data)]
    leaks = _leaks(good, folders, config)
    rows = staying(good, leaks)
    checked = check_suite("diffcap", judged(rows.assign(suite="diffcap")), tolerance=0)
    write_report([checked], DIFFCAP_REPORTS, shard_folders=folders)
    with new_folder(DIFFCAP) as folder:
        for split in SPLITS:
            tables = tqdm(chosen_tables(folders, rows, split), f"build {split}", unit="group")
            write_tables(tables, folder, split, shard_pairs=config.data.shard_pairs)
        values = _card(config, folder, probed=probed, rows=rows, leaks=leaks) | {"num_quarantined": len(bad)}
        text = json.dumps(values, indent=2, sort_keys=True) + "\n"
        write_text(folder / "card.json", text)
        write_text(folder / "README.md", dataset_card(json.loads(text)))
        audit = verdicts(folder, rows, leaks)
        write_json(AUDIT, audit, indent=1, sort_keys=True)
    print("train against test: " + "; ".join(f"{name}: {counts['verdict']}"
                                             for name, counts in audit["benchmarks"].items()))


def _leaks(good: pd.DataFrame, folders: list[Path], config: Config) -> pd.DataFrame:
    thumbnails = functools.partial(read_thumbnails, folders, max_megapixels=config.data.max_megapixels,
                                   runtime=load_runtime())
    settings = config.data.leaks
    # Pairs from users are also compared with other splits if data.leaks.max_distance does not list their source.
    own = {source: None for source in config.data.raw if source not in CATALOG}
    measured = settings.model_copy(update={"max_distance": own | settings.max_distance})
    leaks = find_leaks(good, measured, thumbnails)
    with new_file(LEAKS) as path:
        leaks.to_parquet(path, index=False)
    if settings.action == "stop":
        refuse_leaks(leaks, report=LEAKS)
    reported = leaks[~leaks["leaks"] & leaks["distance"].notna()]
    if len(reported):
        print(f"{reported['pair_id'].nunique():,} pairs look like a pair of a later split and are kept; the smallest "
              f"distance is {reported['distance'].min():.1f} grey levels: see {LEAKS} and data.leaks.max_distance")
    return leaks


def _card(config: Config, folder: Path, *, probed: pd.DataFrame, rows: pd.DataFrame,
          leaks: pd.DataFrame) -> dict[str, Any]:
    bits = config.data.leaks.near_bits
    about_leaks = leak_card(rows, leaks, near_bits=bits, near_train=near_train_images(rows, bits=bits),
                            names=shared_names(probed))
    auc = {source: _auc(folder, source) for source in ("scenes", "scenes_far") if (rows["source"] == source).any()}
    paths = {source: PAIRS / source / "report.json" for source in config.data.raw}
    reports = {source: read_json(path) for source, path in paths.items() if path.exists()}
    return card(rows, folder, config.data) | {"leaks": about_leaks, "pixel_difference_auc": auc,
                                              "incomplete": incomplete_tests(probed, rows, reports)}


def _auc(folder: Path, source: str) -> float | None:
    train, test = _some(folder, "train", "scenes"), _some(folder, "test", source)
    with threadpool_limits(1):  # On a busy machine, several threads of scikit-learn would wait for each other.
        return pixel_difference_auc(train, test)


def _some(folder: Path, split: str, source: str) -> Iterator[Record]:
    records = (record for record in read_records(folder, f"{split}-*.parquet") if record.source == source)
    return itertools.islice(records, AUC_PAIRS)


if __name__ == "__main__":
    run(build)
