"""Stage `report`: one self-contained page about the model that was just scored, and its figures as files."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from onediff.config import load_params
from onediff.data.record import read_records, read_table
from onediff.eval.caption_files import read_predictions
from onediff.eval.metrics.catalog import PAIR_METRICS
from onediff.eval.protocols import PairRow, protocols_of
from onediff.eval.report.charts import standalone
from onediff.eval.report.figures import figures
from onediff.eval.report.gallery import Album, Grid, choose, example, fitted, losses, worst
from onediff.eval.report.page import ModelResults, ordered, ordered_sources, render_page
from onediff.files import new_folder, read_json, read_jsonl, write_text
from onediff.paths import (
    CAPTIONS,
    CARD,
    CURVES,
    DIFFCAP,
    DIFFCAP_REPORTS,
    FIGURES,
    GATE,
    METRICS,
    PARAMS,
    REPORT,
    SCORED,
    STRESS,
    STRESS_DETAILS,
)
from onediff.stages.command import run

# maps each source to the number of example pairs that the gallery shows for each change type
PER_TYPE = {"scenes": 4, "edits": 2, "scenes_far": 0}
PER_TYPE_ELSEWHERE, NUM_WORST, NUM_LOST = 4, 12, 12
IMAGES_BYTES = 5_000_000  # largest size of all images on the page; texts and charts add less than one megabyte

Scored = Mapping[str, Mapping[str, Any]]  # data/scored/test.json


def report() -> None:
    """Write the report to data/report.html, and each chart of the report to a file data/figures/*.svg."""
    page, charts, _ = make_page()
    with new_folder(FIGURES) as folder:
        for name, chart in charts.items():
            (folder / f"{name.replace('/', '-')}.svg").write_text(standalone(chart), encoding="utf-8")
    write_text(REPORT, page)
    print(f"{REPORT}: {len(page) / 1e6:.1f} MB; {FIGURES}: {len(charts)} figures")


def make_page(against: Scored | None = None) -> tuple[str, Mapping[str, Any], int]:
    """Return the HTML of the report, a dict from the name of each chart to the chart, and a number of pairs.

    If `against` holds the scores of another model on the same pairs, the report also shows the pairs with the largest
    difference in favour of that model. The number is the number of these pairs.
    """
    config = load_params(PARAMS)
    model, delta = config.model, config.model.delta
    results = ModelResults(
        when=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        subtitle=f"Vision encoder: {model.vision.path}. Language model: {model.language}. "
                 f"{delta.num_tokens} delta tokens, token layout {model.reading}. Seed {config.seed}.",
        params=PARAMS.read_text(encoding="utf-8"), metrics=read_json(METRICS), gate=read_json(GATE),
        stress=_read_json_if_there(STRESS), card=read_json(CARD),
        curves={phase: read_jsonl(CURVES / f"{phase}.jsonl") for phase in ("align", "tune")},
        audit=_read_json_if_there(DIFFCAP_REPORTS / "audit.json"))
    charts = figures(ordered(results.metrics), results.stress, results.curves)
    rows, scored = read_table(DIFFCAP, "test-*.parquet"), _read_json_if_there(SCORED / "test.json")
    albums = {source: _album(source, [row for row in rows if row["source"] == source], scored, against or {})
              for source in ordered_sources(row["source"] for row in rows)}
    num_lost = sum(len(album.lost) for album in albums.values())
    return render_page(results, fitted(albums, IMAGES_BYTES), charts), charts, num_lost


def _album(source: str, rows: Sequence[PairRow], scored: Scored, against: Scored) -> Album:
    """Return the gallery of a source: pairs of each change type, the lowest CIDEr scores, and the pairs of `_lost`."""
    predictions = read_predictions(CAPTIONS / f"test/{source}.jsonl")
    benchmark = next(iter(protocols_of(source)))
    table = scored.get(benchmark, {})
    scores = {key: {name: table[name][place] for name in PAIR_METRICS}
              for place, key in enumerate(table.get("pair_id", ()))}
    attention = STRESS_DETAILS / f"{source}.attention.jsonl"
    maps: dict[str, dict[str, Grid]] = {}
    if attention.exists():
        maps = {line.pop("pair_id"): line for line in read_jsonl(attention)}
    shown = choose(source, rows, predictions, per_type=PER_TYPE.get(source, PER_TYPE_ELSEWHERE), first=maps)
    cider = {key: values["CIDEr"] for key, values in scores.items()}
    low = worst(source, rows, predictions, cider, count=NUM_WORST) if cider else []
    lost = _lost(benchmark, scored, against)
    chosen = {*shown, *low, *lost}
    examples = {record.pair_id: example(record, predictions[record.pair_id], scores=scores.get(record.pair_id),
                                        maps=maps.get(record.pair_id))
                for record in read_records(DIFFCAP, "test-*.parquet") if record.pair_id in chosen}
    return Album(shown=[examples[key] for key in shown], worst=[examples[key] for key in low],
                 lost=[replace(examples[key], lost=by) for key, by in lost.items()])


def _lost(key: str, scored: Scored, against: Scored) -> dict[str, float]:
    """Return a dict from pair_id to CIDEr difference, for the pairs with the largest difference in favour of `against`.

    `key` is the benchmark. Raises ValueError if the two models were scored with different protocols or references.
    """
    if key not in against or key not in scored:
        return {}
    ours, theirs = scored[key], against[key]
    if any(ours[name] != theirs[name] for name in ("protocol", "references")):
        raise ValueError(f"benchmark {key}: both models must be scored with the same protocol and the same references, "
                         "but the other model was scored differently: score the other model again")
    our_scores, their_scores = (dict(zip(table["pair_id"], table["CIDEr"], strict=True)) for table in (ours, theirs))
    return losses(our_scores, their_scores, count=NUM_LOST)


def _read_json_if_there(path: Path) -> Any:
    return read_json(path) if path.exists() else {}


if __name__ == "__main__":
    run(report)
