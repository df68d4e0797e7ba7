"""Stage `report`: one self-contained page about the model that was just scored."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from onediff.config import Config, load_params
from onediff.data.record import read_records, read_table
from onediff.eval.files import read_predictions
from onediff.eval.report import Example, choose, example, render_page
from onediff.stages import run

PARAMS, CURVES, OUTPUT = Path("params.yaml"), Path("data/curves"), Path("data/report.html")
PER_TYPE = {"scenes": 4, "edits": 2, "scenes_far": 0}  # examples in the gallery
PER_TYPE_ELSEWHERE = 4


def report() -> None:
    """Writes data/report.html."""
    config = load_params(PARAMS)
    page = render_page(
        when=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC", subtitle=_subtitle(config),
        params=PARAMS.read_text(encoding="utf-8"),
        metrics=_read_json(Path("data/metrics.json")), gate=_read_json(Path("data/gate.json")),
        curves={phase: _read_lines(CURVES / f"{phase}.jsonl") for phase in ("align", "tune")},
        card=_read_json(Path("data/diffcap/card.json")), gallery=_gallery(Path("data/diffcap")))
    OUTPUT.write_text(page, encoding="utf-8")
    print(f"{OUTPUT}: {len(page) / 1e6:.1f} MB")


def _subtitle(config: Config) -> str:
    model, delta = config.model, config.model.delta
    return (f"{', '.join(config.data.sources)} · vision {model.vision.path} · language {model.language} · "
            f"{delta.num_tokens} delta tokens from levels {delta.levels}, reading {model.reading}, "
            f"keys {delta.inputs} · seed {config.seed}")


def _gallery(folder: Path) -> dict[str, list[Example]]:
    rows = read_table(folder, "test-*.parquet")
    said: dict[str, str] = {}
    chosen: dict[str, list[str]] = {}
    for benchmark in dict.fromkeys(row["source"] for row in rows):
        per_type = PER_TYPE.get(benchmark, PER_TYPE_ELSEWHERE)
        if per_type:
            own = [row for row in rows if row["source"] == benchmark]
            said |= read_predictions(Path(f"data/captions/test/{benchmark}.jsonl"))
            chosen[benchmark] = choose(benchmark, own, said, per_type=per_type)
    wanted = {key for keys in chosen.values() for key in keys}
    shown = {record.pair_id: example(record.source, record, said[record.pair_id])
             for record in read_records(folder, "test-*.parquet") if record.pair_id in wanted}
    return {benchmark: [shown[key] for key in keys] for benchmark, keys in chosen.items()}


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _read_lines(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


if __name__ == "__main__":
    run(report)
