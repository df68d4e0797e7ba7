"""Stage `report`: one self-contained page about the model that was just scored, and its figures as files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from onediff.config import Config, load_params
from onediff.data.folders import sources_of
from onediff.data.record import read_records, read_table
from onediff.eval.analysis.behaviour import Row
from onediff.eval.evaluation import PAIR_METRICS
from onediff.eval.jsonl import read_predictions
from onediff.eval.metrics.compute import Predictions
from onediff.eval.protocols import protocols_of
from onediff.eval.report.charts import standalone
from onediff.eval.report.figures import figures
from onediff.eval.report.gallery import Album, Grid, choose, example, fitted, losses, worst
from onediff.eval.report.page import ordered, ordered_sources, render_page
from onediff.files import new_folder, write_text
from onediff.paths import DIFFCAP
from onediff.stages.command import run

PARAMS, CURVES, OUTPUT, FIGURES = (Path(name) for name in ("params.yaml", "data/curves", "data/report.html",
                                                           "data/figures"))
PER_TYPE = {"scenes": 4, "edits": 2, "scenes_far": 0}  # examples in the gallery
PER_TYPE_ELSEWHERE, NUM_WORST, NUM_LOST = 4, 12, 12
IMAGES_BYTES = 5_000_000  # of the page; its text and figures take less than one more megabyte

Scored = Mapping[str, Mapping[str, Any]]  # data/scored/test.json


def report() -> None:
    """Writes data/report.html and data/figures/*.svg."""
    page, charts = make_page()
    with new_folder(FIGURES) as folder:
        for name, chart in charts.items():
            (folder / f"{name.replace('/', '-')}.svg").write_text(standalone(chart), encoding="utf-8")
    write_text(OUTPUT, page)
    print(f"{OUTPUT}: {len(page) / 1e6:.1f} MB; {FIGURES}: {len(charts)} figures")


def make_page(against: Scored | None = None) -> tuple[str, Mapping[str, Any]]:
    """The page and its figures. `against`: what another model scored on the same pairs; the page then shows those that
    lose most.
    """
    config = load_params(PARAMS)
    metrics, stress = _read_json(Path("data/metrics.json")), _read_json_if_there(Path("data/stress.json"))
    curves = {phase: _read_lines(CURVES / f"{phase}.jsonl") for phase in ("align", "tune")}
    charts = figures(ordered(metrics), stress, curves)
    scored = _read_json_if_there(Path("data/scored/test.json"))
    return render_page(
        when=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC", subtitle=_subtitle(config),
        params=PARAMS.read_text(encoding="utf-8"), metrics=metrics, gate=_read_json(Path("data/gate.json")),
        stress=stress, curves=curves, card=_read_json(DIFFCAP / "card.json"),
        audit=_read_json_if_there(Path("data/reports/diffcap/audit.json")),
        albums=fitted(_albums(scored, against or {}), IMAGES_BYTES), figures=charts), charts


def _subtitle(config: Config) -> str:
    model, delta = config.model, config.model.delta
    return (f"{', '.join(sources_of(config.data))} · vision {model.vision.path} · language {model.language} · "
            f"{delta.num_tokens} delta tokens from levels {delta.levels}, reading {model.reading}, "
            f"keys {delta.inputs} · seed {config.seed}")


# --- gallery ----------------------------------------------------------------------------------------------------------


def _albums(scored: Scored, against: Scored) -> dict[str, Album]:
    rows = read_table(DIFFCAP, "test-*.parquet")
    sources = ordered_sources(row["source"] for row in rows)
    own = {source: [row for row in rows if row["source"] == source] for source in sources}
    said = {source: read_predictions(Path(f"data/captions/test/{source}.jsonl")) for source in sources}
    maps = {source: _maps(source) for source in sources}
    scores = {source: _pair_scores(source, scored) for source in sources}
    chosen = {source: _chosen(source, own[source], said[source], scores[source], first=maps[source])
              for source in sources}
    lost = {source: _lost(source, scored, against) for source in sources}
    wanted = {key for parts in chosen.values() for keys in parts for key in keys}.union(*lost.values())
    shown = {record.pair_id: example(record, said[record.source][record.pair_id],
                                     scores=scores[record.source].get(record.pair_id),
                                     maps=maps[record.source].get(record.pair_id))
             for record in read_records(DIFFCAP, "test-*.parquet") if record.pair_id in wanted}
    return {source: Album(shown=[shown[key] for key in some], worst=[shown[key] for key in low],
                          lost=[replace(shown[key], lost=by) for key, by in lost[source].items()])
            for source, (some, low) in chosen.items()}


def _chosen(source: str, rows: Sequence[Row], said: Predictions, scores: Mapping[str, Mapping[str, float]], *,
            first: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Pairs of every type, and the worst."""
    some = choose(source, rows, said, per_type=PER_TYPE.get(source, PER_TYPE_ELSEWHERE), first=first)
    cider = {key: its["CIDEr"] for key, its in scores.items()}
    return some, worst(source, rows, said, cider, count=NUM_WORST) if cider else []


def _maps(source: str) -> dict[str, dict[str, Grid]]:
    """pair_id -> side -> attention, for the pairs that stage `stress` looked at."""
    path = Path(f"data/stress/{source}.attention.jsonl")
    return {line.pop("pair_id"): line for line in _read_lines(path)} if path.exists() else {}


def _pair_scores(source: str, scored: Scored) -> dict[str, dict[str, float]]:
    """pair_id -> metric -> score, by the first protocol of the source."""
    its = scored.get(next(iter(protocols_of(source))), {})
    return {key: {name: its[name][place] for name in PAIR_METRICS} for place, key in enumerate(its.get("pair_id", ()))}


def _lost(source: str, scored: Scored, against: Scored) -> dict[str, float]:
    """Raises ValueError if the other model was scored by another protocol or on other references."""
    key = next(iter(protocols_of(source)))
    if key not in against or key not in scored:
        return {}
    ours, theirs = scored[key], against[key]
    if any(ours[name] != theirs[name] for name in ("protocol", "references")):
        raise ValueError(f"{key}: the other model was scored by another protocol or on other references: "
                         "score it again")
    both = [dict(zip(its["pair_id"], its["CIDEr"], strict=True)) for its in (ours, theirs)]
    return losses(*both, count=NUM_LOST)


# --- files ------------------------------------------------------------------------------------------------------------


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _read_json_if_there(path: Path) -> Any:
    return _read_json(path) if path.exists() else {}


def _read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


if __name__ == "__main__":
    run(report)
