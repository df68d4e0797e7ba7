"""Everything about one model on one page: a single HTML file with its pictures inside, no network and no script."""

from __future__ import annotations

import base64
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from onediff.data.record import Record
from onediff.eval.behaviour import Row
from onediff.eval.evaluation import checks
from onediff.eval.metrics import METRICS, Predictions
from onediff.eval.protocols import PROTOCOLS

MAX_POINTS = 240  # of a curve
SPEED = (("pairs_per_s", "rows/s", "{:.0f}"), ("tokens_per_s", "tokens/s", "{:,.0f}"),
         ("padding_share", "padding left out", "{:.1%}"), ("loader_wait_share", "waiting for data", "{:.1%}"),
         ("memory_gib", "memory, GiB", "{:.2f}"), ("tflops_per_s", "TFLOP/s", "{:.3g}"), ("mfu", "MFU", "{:.1%}"))
CHART_PX = (560, 200)
FIGURES = {  # key in metrics.json -> (label, what it counts)
    "change_found_rate": ("change found", "changed pairs for which a change is claimed"),
    "change_type_accuracy": ("type right", "changed pairs"),
    "changed_object_accuracy": ("object right", "changed pairs: color and shape"),
    "change_accuracy": ("all right", "changed pairs: type, object and what became of it"),
    "false_alarm_rate": ("false alarms", "unchanged pairs not recognised as unchanged; lower is better"),
    "swap_consistency": ("swap consistency", "pairs whose caption is undone when before and after are exchanged"),
    "operation_accuracy": ("operation right", "all pairs"),
}
HEADLINES = ("change_type_accuracy", "changed_object_accuracy", "false_alarm_rate", "swap_consistency",
             "operation_accuracy")
_MAGIC = {b"\xff\xd8": "jpeg", b"GI": "gif", b"RI": "webp"}


@dataclass(frozen=True)
class Example:
    """One pair of the gallery. Images are data URIs; regions are [left, top, width, height] in percent of the image."""

    pair_id: str
    change_type: str
    before: str
    after: str
    region_before: list[float] | None
    region_after: list[float] | None
    references: list[str]
    prediction: str
    checks: dict[str, bool]

    @property
    def right(self) -> bool:
        return all(self.checks.values())


def render_page(*, when: str, subtitle: str, params: str, metrics: Mapping[str, Any], gate: Mapping[str, Any],
                curves: Mapping[str, list[dict[str, float]]], card: Mapping[str, Any],
                gallery: Mapping[str, list[Example]]) -> str:
    """The page as HTML. `params`: params.yaml as text; `curves`: lines of data/curves by phase; others as on disk."""
    metrics, gate = _ordered(metrics), _ordered(gate)
    return _template().render(
        when=when, subtitle=subtitle, params=params, metrics=metrics, gate=gate, card=card, gallery=gallery,
        names=METRICS, figures=FIGURES, headlines=_headlines(metrics),
        phases={name: _phase(lines) for name, lines in curves.items()},
        types={name: _type_table(result) for name, result in metrics.items()}, counts=_count_table(card))


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["percent"] = lambda share: f"{100 * share:.1f}"
    return environment.from_string(Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8"))


def _ordered(results: Mapping[str, Any]) -> dict[str, Any]:
    return {name: results[name] for name in dict.fromkeys((*PROTOCOLS, *results)) if name in results}


def _headlines(metrics: Mapping[str, Any]) -> dict[str, list[tuple[str, str]]]:
    """benchmark -> (label, value) of the figures that the top of the page shows."""
    return {benchmark: [*((FIGURES[key][0], f"{100 * result[key]:.1f} %") for key in HEADLINES if key in result),
                        ("CIDEr", f"{100 * result['CIDEr']:.1f}")]
            for benchmark, result in metrics.items() if benchmark != "scenes_far"}


def _type_table(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row per change type: its pairs, the share that is right, CIDEr and ROUGE-L."""
    right = result.get("change_type_accuracy_by_type") or result.get("operation_accuracy_by_operation") or {}
    if "false_alarm_rate" in result:
        right = {**right, "none": 1 - result["false_alarm_rate"]}
    return [{"type": kind, "right": right.get(kind), **values} for kind, values in result["by_change_type"].items()]


def _count_table(card: Mapping[str, Any]) -> list[tuple[str, dict[str, int]]]:
    """(source, {split: pairs})."""
    table: dict[str, dict[str, int]] = {}
    for split, sources in card["num_pairs"].items():
        for source, kinds in sources.items():
            table.setdefault(source, {})[split] = sum(kinds.values())
    return list(table.items())


# --- pictures --------------------------------------------------------------------------------------------------------


def choose(benchmark: str, rows: Sequence[Row], predictions: Predictions, *, per_type: int) -> list[str]:
    """pair_ids for the gallery, in order of type: right ones, then as many wrong ones, as far as there are both."""
    by_type: dict[str, dict[bool, list[str]]] = {}
    for row in rows:
        right = all(checks(benchmark, predictions[row["pair_id"]], row).values())
        by_type.setdefault(row["change_type"], {True: [], False: []})[right].append(row["pair_id"])
    chosen = []
    for _, found in sorted(by_type.items()):
        wrong = found[False][:max(per_type // 2, per_type - len(found[True]))]
        chosen += found[True][:per_type - len(wrong)] + wrong
    return chosen


def example(benchmark: str, record: Record, prediction: str) -> Example:
    """A gallery entry. Raises OSError if an image cannot be read."""
    where = record.provenance
    both = where.get("region")
    cropped = record.change_type == "crop"  # its region is what the second image shows
    return Example(
        pair_id=record.pair_id, change_type=record.change_type,
        before=data_uri(record.before), after=data_uri(record.after),
        region_before=_percent(where.get("region_before") or both, record.before),
        region_after=None if cropped else _percent(where.get("region_after") or both, record.after),
        references=record.references, prediction=prediction, checks=checks(benchmark, prediction, vars(record)))


def data_uri(image: bytes) -> str:
    kind = _MAGIC.get(image[:2], "png")
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def _percent(box: list[int] | None, image: bytes) -> list[float] | None:
    if box is None:
        return None
    from onediff.inputs.images import open_image

    width, height = open_image(image).size
    left, top, right, bottom = box
    return [round(100 * left / width, 2), round(100 * top / height, 2), round(100 * (right - left) / width, 2),
            round(100 * (bottom - top) / height, 2)]


# --- curves ----------------------------------------------------------------------------------------------------------


def _phase(lines: list[dict[str, float]]) -> dict[str, Any]:
    """The charts and the throughput of one phase."""
    steps = _points(lines, "loss")
    charts = [("loss", line_chart(thin(steps), thin(smooth(steps)), label="loss"))] if steps else []
    val = _points(lines, "val_CIDEr")
    if val:
        charts.append(("CIDEr on val (times 100)", line_chart([], [(x, 100 * y) for x, y in val], label="val CIDEr")))
    return {"charts": charts, "steps": int(steps[-1][0]) if steps else 0,
            "loss": smooth(steps)[-1][1] if steps else None,
            "seconds": max((line["seconds"] for line in lines if "seconds" in line), default=None),
            "speed": [(said, form.format(statistics.median(values))) for key, said, form in SPEED
                      if (values := [line[key] for line in lines if key in line])]}


def _points(lines: Iterable[dict[str, float]], key: str) -> list[tuple[float, float]]:
    """(step, value), one per step: a resumed run may have written a step twice, and the last one counts."""
    return sorted({line["step"]: line[key] for line in lines if line.get(key) is not None}.items())


def smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Mean over the points nearby, a thirtieth of the curve in all; as wide as the ends allow."""
    reach = len(points) // 60
    return [(x, statistics.fmean(y for _, y in points[max(0, k - reach):k + reach + 1]))
            for k, (x, _) in enumerate(points)]


def thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    step = max(1, math.ceil(len(points) / MAX_POINTS))
    return [*points[:-1:step], *points[-1:]]


def line_chart(faint: Sequence[tuple[float, float]], strong: Sequence[tuple[float, float]], *, label: str) -> Markup:
    """An inline SVG of one curve (and its raw values behind it), y from 0 to a round number."""
    width, height = CHART_PX
    left, bottom, top = 44, 24, 8
    high = _round_up(max(y for _, y in [*strong, *faint]))
    first, last = min(x for x, _ in strong), max(x for x, _ in strong)

    def place(x: float, y: float) -> tuple[float, float]:
        share = (x - first) / (last - first) if last > first else 0.5
        return left + share * (width - left - 12), height - bottom - y / high * (height - bottom - top)

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}, last value {strong[-1][1]:.3g}">']
    for k in range(5):
        value = high * k / 4
        _, y = place(first, value)
        parts.append(f'<line class="grid" x1="{left}" x2="{width - 12}" y1="{y:.1f}" y2="{y:.1f}"/>'
                     f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    for x in (first, last) if last > first else (first,):
        anchor = "start" if x == first else "end"
        parts.append(f'<text x="{place(x, 0)[0]:.1f}" y="{height - 6}" text-anchor="{anchor}">step {x:g}</text>')
    for kind, points in (("faint", faint), ("strong", strong)):
        path = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in points)
        parts.append(f'<polyline class="{kind}" points="{path}"/>')
    if len(strong) <= 30:
        parts += ['<circle class="dot" r="3" cx="{:.1f}" cy="{:.1f}"/>'.format(*place(x, y)) for x, y in strong]
    return Markup("".join([*parts, "</svg>"]))


def _round_up(value: float) -> float:
    """The next of 1, 1.2, 1.6, 2, 2.4, 3.2, 4, 5, 6, 8, 10 times a power of ten: quarters of it are short numbers."""
    if value <= 0 or not math.isfinite(value):
        return 1.0
    scale = 10.0 ** math.floor(math.log10(value))
    steps = (1, 1.2, 1.6, 2, 2.4, 3.2, 4, 5, 6, 8, 10)
    return scale * next(step for step in steps if value <= step * scale * (1 + 1e-9))
