"""Stage `stress` tests the tuned model on perturbed pairs and measures where its delta tokens look."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from onediff.config import Config, load_params, load_runtime
from onediff.data.record import Record, read_records, read_table
from onediff.eval.analysis.stress import CURVE_FIGURES, choose, figures, is_stressed, num_trials, trials
from onediff.eval.metrics.words import Predictions
from onediff.eval.protocols import rounded
from onediff.files import new_folder, write_json
from onediff.library_logs import silence_libraries
from onediff.paths import DIFFCAP, STRESS, STRESS_DETAILS
from onediff.stages.command import run

if TYPE_CHECKING:
    from onediff.model.captioner import Captioner

TESTS = "test-*.parquet"


def stress(model: str = "data/models/tune") -> None:
    """Caption perturbed test pairs, and write the results to data/stress.json and the details to data/stress/.

    BENCHMARK.jsonl contains the caption of each pair under each perturbation, and BENCHMARK.attention.jsonl contains
    the attention maps of each pair. The files are identical if the model and the pairs are identical.
    """
    config, runtime = load_params(), load_runtime()
    silence_libraries()
    from onediff.model.captioner import Captioner

    captioner = Captioner.load(Path(model), device=runtime.device)
    rows = read_table(DIFFCAP, TESTS)
    benchmarks = [name for name in dict.fromkeys(row["source"] for row in rows) if is_stressed(name)]
    chosen = {key for name in benchmarks for key in choose([row for row in rows if row["source"] == name],
                                                           config.stress.num_pairs, seed=config.seed)}
    with new_folder(STRESS_DETAILS) as folder:
        records = [record for record in read_records(DIFFCAP, TESTS) if record.pair_id in chosen]
        results = {name: _measure(captioner, name, [record for record in records if record.source == name], config,
                                  folder) for name in benchmarks}
    write_json(STRESS, rounded(results), indent=1)
    _show(results)


def _measure(captioner: Captioner, benchmark: str, records: Sequence[Record], config: Config,
             folder: Path) -> dict[str, Any]:
    from onediff.eval.analysis.attention_maps import SIDES, attention_figures, maps_of_records, region_figures
    from onediff.eval.caption import caption_records

    captions: dict[str, Predictions] = {}
    total = num_trials(benchmark, config.stress) * len(records)
    with ((folder / f"{benchmark}.jsonl").open("w", encoding="utf-8") as file,
          tqdm(desc=f"stress {benchmark}", unit="pair", total=total) as bar):
        for trial, pairs in trials(benchmark, records, config.stress, seed=config.seed):
            captions[trial] = {}
            for record, text in caption_records(captioner, pairs, config.caption, config.tasks):
                bar.update()
                captions[trial][record.pair_id] = text
                line = {"trial": trial, "pair_id": record.pair_id, "prediction": text}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
    result = figures(benchmark, captions, [vars(record) for record in records], config.stress)
    if captioner.model.delta is None:
        return result
    images = []
    with (folder / f"{benchmark}.attention.jsonl").open("w", encoding="utf-8") as file:
        for record, maps in maps_of_records(captioner, records):
            grids = {side: getattr(maps, side).round(6).tolist() for side in SIDES}
            file.write(json.dumps({"pair_id": record.pair_id, **grids}) + "\n")
            images += region_figures(record, maps)
    return result | {"attention": attention_figures(images)}


def _show(results: dict[str, Any]) -> None:
    # If stdout is a pipe, rich would otherwise wrap the table at 80 columns.
    console = Console(width=max(120, Console().width))
    for name, result in results.items():
        for part in ("identical", "unrelated", "swapped", "attention"):
            values = result.get(part, {})
            shown = [f"{key} {values[key]:.3f} [{low:.3f}, {high:.3f}]"
                     for key, (low, high) in values.get("intervals", {}).items() if not key.startswith("level_")]
            if shown:
                console.print(f"{name}, {part}: " + " · ".join(shown), highlight=False, markup=False)
        points = [point for curve in result["curves"].values() for point in curve.values()]
        columns = [key for key in (*CURVE_FIGURES, "CIDEr") if any(key in point for point in points)]
        table = Table("perturbation", "strength", *columns, title=f"{name}, stress test", title_justify="left")
        for perturbation, curve in result["curves"].items():
            for strength, point in curve.items():
                cells = [f"{point[key]:.3f}" if key in point else "" for key in columns]
                table.add_row(perturbation if strength == "none" else "", strength, *cells)
            table.add_section()
        console.print(table)


if __name__ == "__main__":
    run(stress)
